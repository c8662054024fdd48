"""The moments of a run at which faults are injected, as plans for pauses/sitecustomize.py."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

UPDATES, EVERY, WORKERS, BATCH_SIZE = 40, 10, 2, 4
"""Updates of the run, and between its checkpoints, of which it keeps one; it pauses in rank 0."""
UPDATES_AHEAD = 6
SHARDS = 6
"""Number for the latents that `prepare` makes."""

BEFORE_FIRST, BETWEEN, WRITE, MANIFEST = "before the first", "between two", "during the write", "before the manifest"
PRUNING, FINAL, PREPARE, PUSH = "while pruning", "final weights", "prepare", "push"
TRAINING = (BEFORE_FIRST, BETWEEN, WRITE, MANIFEST, PRUNING, FINAL)
MOMENTS = (*TRAINING, PREPARE, PUSH)

WORKER, ALL_WORKERS, LOADING, COORDINATOR = "worker", "all workers", "loading task", "data's coordinator"
CONTROLLER, DRIVER, NODE, GCS, STORAGE = "Train's controller", "driver", "node", "GCS", "storage"
TARGETS = (WORKER, ALL_WORKERS, LOADING, COORDINATOR, CONTROLLER, DRIVER, GCS, STORAGE, NODE)

NOT_THERE = {
    (FINAL, LOADING),  # all batches are made
    *((PREPARE, target) for target in (COORDINATOR, CONTROLLER)),  # Ray Data runs in the driver
    *((PUSH, target) for target in (WORKER, ALL_WORKERS, LOADING, COORDINATOR, CONTROLLER, GCS)),  # they have ended
}
"""Moments at which no such process runs."""


@dataclass(frozen=True)
class Plan:
    """A moment, as the processes of a run know it."""

    place: str
    detail: str
    held_from: int | None = None
    """Loading tasks wait at this sample and those after it, so that one is there to be killed."""


def draw_plan(target: str, moment: str, random: Random) -> Plan:
    """Draw one of the places in the code that the moment stands for."""
    if moment in (PREPARE, PUSH):
        return _beside_training(target, moment, random)
    if target == STORAGE and moment not in (BEFORE_FIRST, BETWEEN):
        return _in_store(moment, random)
    last_checkpoint = UPDATES - EVERY if target == LOADING else UPDATES
    step = random.randrange(EVERY, last_checkpoint + 1, EVERY)
    if moment in (BEFORE_FIRST, BETWEEN):
        first = 1 if moment == BEFORE_FIRST else EVERY + 1
        last = EVERY if moment == BEFORE_FIRST else UPDATES - EVERY
        step = random.choice([update for update in range(first, last) if update % EVERY])
        place, detail = "update", str(step)
    elif moment == WRITE:
        places = ("without files", "without training_state.pt", "with half of training_state.pt")
        place, detail = "write", f"checkpoint-{step} {random.choice(places)}"
    elif moment == MANIFEST:
        place, detail = "manifest", f"checkpoint-{step}"
    elif moment == PRUNING:
        step = random.randrange(2 * EVERY, last_checkpoint + 1, EVERY)
        place, detail = "prune", f"checkpoint-{step - EVERY} {random.choice(('whole', 'half deleted'))}"
    else:
        place, detail = "final", random.choice(("diffusion_pytorch_model.safetensors", "config.json"))
    return Plan(place, detail, _held_from(step) if target == LOADING else None)


def _in_store(moment: str, random: Random) -> Plan:
    """Return a place in the sending to an object store."""
    step = random.randrange(EVERY, UPDATES + 1, EVERY)
    if moment == WRITE:
        names = ("controlnet/diffusion_pytorch_model.safetensors", "training_state.pt")
        return Plan("upload", f"checkpoint-{step}/{random.choice(names)}")
    if moment == MANIFEST:
        return Plan("upload", f"checkpoint-{step}/manifest.json")
    if moment == PRUNING:
        return Plan("delete", f"checkpoint-{random.randrange(EVERY, UPDATES, EVERY)}")
    return Plan("upload", random.choice(("diffusion_pytorch_model.safetensors", "config.json")))


def _beside_training(target: str, moment: str, random: Random) -> Plan:
    if moment == PUSH:
        return Plan("push", random.choice(("create_repo", "create_commit")))
    shard = random.randrange(1, SHARDS)
    return Plan("load" if target == LOADING else "encode", str(shard))


def _held_from(step: int) -> int:
    """Return a sample that is loaded after update `step`, beyond what Ray Data reads ahead before a worker goes on."""
    return (step + UPDATES_AHEAD) * WORKERS * BATCH_SIZE
