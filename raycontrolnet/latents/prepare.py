"""`raycontrolnet prepare`: the latent cache of a data set, made or completed by itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TextIO

from raycontrolnet.cluster.logs import logging_to, shown_on
from raycontrolnet.cluster.resources import worker_resources
from raycontrolnet.cluster.session import ray_session, runs_on_a_cluster
from raycontrolnet.config.checks import find_token, with_absolute_paths
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.image_sizes import find_buckets
from raycontrolnet.data.mixture import in_words as sources_in_words
from raycontrolnet.errors import ConfigError, Interrupted, end_told
from raycontrolnet.latents.ensure import SEVERAL_MACHINES, complete, report_path
from raycontrolnet.latents.inputs import check_inputs
from raycontrolnet.latents.manifest import BadSample
from raycontrolnet.latents.plan import LatentPlan, prepare_command
from raycontrolnet.model.families.registry import families

STANDS = "What is cached stands; the same command goes on from there."


@dataclass(frozen=True)
class PrepareResult:
    """The cache that `prepare` made or completed."""

    folder: str
    num_samples: int
    """Samples in the cache."""
    num_bytes: int
    bad_samples: tuple[BadSample, ...]
    """Samples that were skipped."""
    num_encoded: int
    """Samples that were encoded now; the others were there."""
    seconds: float


def prepare(config: TrainConfig, *, stream: TextIO | None = None) -> PrepareResult:
    """Encode the images of a data set into its latent cache; those that are there already are not encoded again.

    Uses Ray as `fit` does. If it is killed, running it again continues where it stopped.

    Args:
        config: the settings of the run that will use the cache.
        stream: where progress is shown; standard error by default.

    Raises:
        UserError: bad settings, data or models (exit code 2 on the command line).
        RunError: the encoding failed, for instance on a full disk; what was written stands (exit code 1).
        Interrupted: Ctrl-C or SIGTERM (exit code 130 or 143).
    """
    with shown_on(stream) as shown, end_told(shown, lambda: STANDS):
        try:
            return _prepare(config, shown)
        except KeyboardInterrupt:
            raise Interrupted(f"Interrupted. {STANDS}") from None


def _prepare(config: TrainConfig, stream: TextIO) -> PrepareResult:
    started = time.monotonic()
    config = with_absolute_paths(config)
    token = find_token(config.hub_token)
    inputs = check_inputs(config, token, elsewhere=runs_on_a_cluster(config), skip_bad=True)
    source, family = inputs.source, inputs.family or families()[0]
    if sources := sources_in_words(source, config):
        stream.write(f"data: {sources}\n")
    buckets = find_buckets(config, source, family.resolution_multiple)
    if buckets:
        stream.write("".join(f"{line}\n" for line in buckets.table()))
    plan = LatentPlan.of(config, source, family, token, buckets)
    plan.check_encoding()
    if changes := plan.changes():
        stream.write(f"latents: the data changed since ({changes}); what is new will be encoded\n")
    there, missing = plan.survey()
    with logging_to(report_path(plan, "prepare.log")):
        if not missing or config.in_this_process:
            manifest = complete(plan, there, missing, None, stream)
        else:
            with ray_session(config.address):
                resources = worker_resources(config)
                if not resources.one_machine and config.latents_cache_dir is None:
                    raise ConfigError([f"--latents_cache_dir: {SEVERAL_MACHINES}"])
                resources.say_what_is_awaited(stream)
                manifest = complete(plan, there, missing, resources, stream)
    use = prepare_command(config, "train", cache_latents="on")
    stream.write(f"latents: train, or tune, uses them with these flags and the run's others:\n  {use}\n")
    return PrepareResult(
        folder=plan.folder.uri,
        num_samples=manifest.num_rows,
        num_bytes=manifest.num_bytes,
        bad_samples=manifest.bad_samples,
        num_encoded=sum(len(shard.rows) for shard in missing),
        seconds=time.monotonic() - started,
    )
