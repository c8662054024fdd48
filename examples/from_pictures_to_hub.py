"""From pictures and captions to a ControlNet on the Hub, cell by cell: a notebook or a script. Takes 4 minutes.

    python examples/from_pictures_to_hub.py

As it is, it draws its pictures, uses the small base model of the package, and pushes nothing. For your own data, put
the pictures into PICTURES, each with its caption in a .txt file of the same name, and change the constants below.
"""

# %% What to train, and where
import json
import os
from pathlib import Path

from raycontrolnet import ConditionConfig, GenerateConfig, TrainConfig, condition, fit, generate
from raycontrolnet.demo.demo import BASE
from raycontrolnet.demo.shapes import draw_row

PICTURES = Path("pictures")
BASE_MODEL, RESOLUTION = str(BASE), 64  # "stable-diffusion-v1-5/stable-diffusion-v1-5", 512
MAX_TRAIN_STEPS = int(os.environ.get("MAX_TRAIN_STEPS", "800"))
HUB_MODEL_ID = os.environ.get("HUB_MODEL_ID")  # "me/my-controlnet"; the token in HF_TOKEN, or by `hf auth login`

# %% Pictures with captions
if not PICTURES.exists():
    unfinished = Path("pictures-unfinished")
    unfinished.mkdir(exist_ok=True)
    for index in range(512):
        row = draw_row(index, RESOLUTION, seed=0)
        row.image.save(unfinished / f"{index:04}.png")
        (unfinished / f"{index:04}.txt").write_text(row.text, encoding="utf-8")
    unfinished.rename(PICTURES)

# %% Their conditioning images: edges
data = condition(ConditionConfig(images=str(PICTURES), condition="canny", resolution=RESOLUTION))
print(f"{data.num_rows} rows in {data.folder}")

# %% Train, with a look at a control image on the way; push at the end
# A second time, name another output_dir, or go on by resume_from_checkpoint="latest".
with (data.folder / "metadata.jsonl").open(encoding="utf-8") as lines:
    rows = [json.loads(line) for line in lines]
control_image, prompt = str(data.folder / rows[0]["conditioning_image"]), rows[0]["text"]
result = fit(
    TrainConfig(
        pretrained_model_name_or_path=BASE_MODEL,
        train_data_dir=str(data.folder),
        output_dir="edges-controlnet",
        resolution=RESOLUTION,
        train_batch_size=16,
        learning_rate=1e-3,  # for the small model; 1e-5 for Stable Diffusion
        max_train_steps=MAX_TRAIN_STEPS,
        validation_prompt=(prompt,),
        validation_image=(control_image,),
        validation_steps=200,
        control_fidelity="canny",
        seed=0,
        push_to_hub=HUB_MODEL_ID is not None,
        hub_model_id=HUB_MODEL_ID,
    )
)

# %% What came of it; the curves are in report.html
print(f"held-out loss {result.val_loss}, control gap {result.control_gap}, fidelity {result.control_fidelity}")
print(f"control appeared at step {result.control_appeared_at_step}; {result.output_dir / 'report.html'}")
if result.hub_url:
    print(result.hub_url)

# %% Draw with it
config = GenerateConfig(
    controlnet=str(result.output_dir),
    prompt=("red circle with blue background", "white triangle with green background"),
    image=(control_image,),
    num_images=2,
    control_fidelity="canny",
    out="edges-drawn",
)
for pair in generate(config):
    print(pair.prompt, pair.grid, pair.control_fidelity)
