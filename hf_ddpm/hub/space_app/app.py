"""A page that shows a diffusion model: its samples, its reverse process and its forward process.

On a Space, the modules of `hf_ddpm` that the page imports lie beside this file, as they are in the package.
requirements.txt lists what those modules need.

    x_T ~ N(0, I), for image i from Generator(seed + i);  for t in timesteps: x_t <- step(unet(x_t, t), t, x_t)
    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, the forward process
"""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from hf_ddpm.hub.space_app.actions import Handlers
from hf_ddpm.hub.space_app.model import EACH_LABEL, NO_LABEL, STEP_DENOISER, Model
from hf_ddpm.hub.space_app.pictures import CSS, enlarged
from hf_ddpm.image_size import format_size
from hf_ddpm.labels import describe_labels

MODEL = os.environ.get("MODEL", "")  # a Hub id, or a folder

# Of a model that was tuned for few steps: the numbers of steps that stand beside one another.
FEW_STEPS = (1, 2, 4, 20)


def about(model: Model) -> str:
    """Return a description of the model in Markdown."""
    kinds = {1: "gray images", 3: "color images", 4: "color images with transparency,"}
    kind = kinds[model.channels] if model.has_pictures else f"arrays of {model.channels} channels and"
    predicted = {
        "epsilon": "the noise in a noisy image",
        "sample": "the clean image in a noisy one",
        "v_prediction": "v, a mix of the noise and the clean image",
        STEP_DENOISER: "the next, less noisy image",
    }[model.prediction_type]
    num_parameters = sum(p.numel() for p in model.pipeline.unet.parameters())
    labels = model.pipeline.labels
    known = "" if labels is None else f" It takes labels: {describe_labels(labels)}."
    guidance = (
        "\n\n**Guidance.** Each prediction is led away from that of a weaker model: the same network without a class, "
        "one that was trained less, or both. With a scale of 1 it is not."
    )
    guidance = guidance if model.can_be_guided else ""
    if model.is_tuned:
        samplers = (
            "The model was tuned to name, from any x<sub>t</sub>, an image to which the steps would lead. *lcm* goes "
            "to this x̂<sub>0</sub> at once, and adds new noise for the next step."
        )
    else:
        samplers = (
            "*ddpm* draws new noise at each step, and is at its best with all steps. *ddim*, *dpmsolver++* and "
            "*unipc* draw none, and need 10 to 50 steps."
        )
    card = "" if Path(model.name).exists() else f"\n\n[The model's card](https://huggingface.co/{model.name})"
    return (
        f"A denoising diffusion model for {kind} of {_size_of(model)} pixels. Its network has "
        f"{num_parameters:,} parameters and predicts {predicted}.{known}\n\n"
        f"**Forward process.** In {model.num_timesteps:,} steps, an image dissolves in Gaussian noise: "
        "x<sub>t</sub> = √ᾱ<sub>t</sub> x<sub>0</sub> + √(1 - ᾱ<sub>t</sub>) ε.\n\n"
        "**Reverse process.** The model goes the same way back, from pure noise to an image. At each step, its "
        "network estimates the clean image, x̂<sub>0</sub>, from the noisy one, x<sub>t</sub>, and a sampler takes a "
        f"step towards it. {samplers}\n\n"
        f"Image *i* depends on seed + *i* alone.{guidance}\n\n"
        "**Editing.** An image is noised up to a timestep, which the strength names, and denoised from there. Where "
        "there is a mask, the model fills the image so that it fits the rest, which stays as it is."
        f"{card}"
    )


def _size_of(model: Model) -> str:
    return format_size((model.height, model.width)).replace(" x ", " × ")


def build(name: str) -> gr.Blocks:
    """Return the page of the model called `name`, a Hub id or a folder."""
    model = Model(name)
    is_fast = model.samplers[0] != "ddpm"  # which needs all steps
    num_images = 16 if is_fast and model.height * model.width <= 64**2 else 4
    handlers = Handlers(model, num_images)
    title = Path(name).resolve().name if Path(name).exists() else name
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {title}\nA diffusion model at work: from noise to images, and back.")
        with gr.Tab("Sample"):
            samples = _add_sampling(model, handlers)
        columns = []
        if model.is_tuned:
            with gr.Tab("Few steps"):
                columns = _add_few_steps(model, handlers)
        with gr.Tab("Edit"):
            editor = _add_editing(model, handlers)
        with gr.Tab("Forward process"):
            forward = _add_forward_process(model, handlers)
        with gr.Tab("About"):
            gr.Markdown(about(model))
        first = page.load(handlers.show_first, None, [*samples, editor], api_visibility="private")
        first.then(**forward, api_name="add_noise")
        for each in columns:
            first.then(**each, show_progress="hidden", api_visibility="private")
    return page


def _add_sampling(model: Model, handlers: Handlers) -> list[gr.HTML]:
    """Add the controls and pictures of the tab "Sample", and return the pictures."""
    with gr.Row():
        with gr.Column(scale=1, min_width=250):
            sampler = gr.Dropdown(model.samplers, value=model.samplers[0], label="Sampler")
            steps = _steps(model)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            count = gr.Slider(1, 32, handlers.num_images, step=1, label="Images")
            label, guidance = _label(model, EACH_LABEL), _guidance_scale(model)
            button = gr.Button("Sample", variant="primary")
        with gr.Column(scale=3, min_width=480):
            gr.Markdown("### Images")
            images = gr.HTML(elem_id="images", elem_classes="show", min_height=160)
            gr.Markdown("### How the first one emerges")
            chain = gr.HTML(elem_id="chain", elem_classes="show", min_height=160)
    controls = [sampler, steps, seed, count, label, guidance]
    button.click(handlers.show_samples, controls, [images, chain], api_name="sample")
    return [images, chain]


def _add_few_steps(model: Model, handlers: Handlers) -> list[dict[str, Any]]:
    """Add the controls and pictures of the tab "Few steps", and return what fills each of its columns.

    Each column is an event of its own: that of one step need not wait for the others.
    """
    columns = []
    with gr.Row():
        with gr.Column(scale=1, min_width=250):
            gr.Markdown(
                "The images of a row come from the same noise. The slider chooses the noises. More than "
                f"{model.default_steps} steps also visit timesteps that the model was not tuned for."
            )
            seed = gr.Slider(0, 999, 0, step=1, label="Seed")
            label = _label(model, EACH_LABEL)
        with gr.Column(scale=3, min_width=480), gr.Row():
            for num_steps in FEW_STEPS:
                if num_steps > model.num_timesteps:
                    continue
                with gr.Column(min_width=96):
                    gr.Markdown("### 1 step" if num_steps == 1 else f"### {num_steps} steps")
                    images = gr.HTML(elem_id=f"in_{num_steps}_steps", elem_classes="show", min_height=300)
                show = partial(handlers.show_in_steps, num_steps)
                columns.append({"fn": show, "inputs": [seed, label], "outputs": images})
    for each in columns:
        _show_while_changed(each, seed, label)
    return columns


def _add_editing(model: Model, handlers: Handlers) -> gr.ImageEditor | gr.Image:
    """Add the controls and pictures of the tab "Edit", and return what shows the image that is edited at first.

    A model that cannot edit images has a sentence that says why, and the controls are hidden.
    """
    refusal = model.editing_refusal()
    gr.Markdown(f"This model cannot edit images: {refusal}.", visible=bool(refusal))
    with gr.Row(visible=not refusal):
        with gr.Column(scale=2, min_width=300):
            given, first = _editor(model) if model.arrays is None else _array_files(model)
        with gr.Column(scale=1, min_width=250):
            strength = gr.Slider(
                0.05, 1, 1, step=0.05, label="Strength", info="Near 0 keeps the image. 1 begins with pure noise."
            )
            label = _label(model, NO_LABEL if model.has_no_label else EACH_LABEL)
            guidance = _guidance_scale(model)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            steps = _steps(model)
            button = gr.Button("Edit", variant="primary")
    edits = gr.HTML(elem_id="edits", elem_classes="show", min_height=160, visible=not refusal)
    controls = [*given, strength, label, guidance, seed, steps]
    show = handlers.show_edits if model.arrays is None else handlers.show_array_edits
    button.click(show, controls, edits, api_visibility="private" if refusal else "public", api_name="edit")
    return first


def _editor(model: Model) -> tuple[list[gr.ImageEditor], gr.ImageEditor]:
    """Add an editor with a white brush, for images that `enlarged` returns.

    Returns:
        What a visitor edits, and what shows the first sample.
    """
    gr.Markdown(
        "Paint over what the model is to repaint: it fills this so that it fits the rest, which stays as it is. If "
        "nothing is painted, the whole image is varied: lower the strength for that. An image of another size is "
        f"cropped and resized to {_size_of(model)} pixels."
    )
    canvas = enlarged(Image.new("L", (model.width, model.height))).size
    editor = gr.ImageEditor(
        label="Image",
        type="pil",
        format="png",  # which loses nothing
        sources=["upload"],
        transforms=[],
        layers=False,
        brush=gr.Brush(default_size=max(canvas) // 8, colors=["#ffffff"], color_mode="fixed"),
        canvas_size=canvas,
        buttons=[],
        elem_id="editor",
    )
    return [editor], editor


def _array_files(model: Model) -> tuple[list[gr.File], gr.Image]:
    """Add the files of an array and of its mask; see `_editor`."""
    shape = (model.channels, model.height, model.width)
    gr.Markdown(
        f"Give an array of the shape {shape} ({model.arrays}), and a mask. The model fills what is white in the mask, "
        "or not 0 where the mask is an array, so that it fits the rest, which stays as it is, to the last bit. "
        "Without a mask, the whole array is varied: lower the strength for that. Without an array, the first sample "
        "is edited."
    )
    tiff = [".tif", ".tiff"] if find_spec("tifffile") else []
    with gr.Row():
        array = gr.File(label="Array", file_types=[".npy", *tiff], height=120, elem_id="array")
        mask = gr.File(label="Mask", file_types=[".npy", ".png"], height=120, elem_id="mask")
    first = gr.Image(label="First sample", type="pil", interactive=False, height=240, buttons=[])
    return [array, mask], first


def _add_forward_process(model: Model, handlers: Handlers) -> dict[str, Any]:
    """Add the controls and pictures of the tab "Forward process", and return what fills them."""
    T = model.num_timesteps
    with gr.Row():
        with gr.Column(scale=1, min_width=250):
            timestep = gr.Slider(0, T - 1, T // 4, step=1, label="Timestep t")
            seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0)
            upload = gr.Image(
                label="Your own image",
                type="pil",
                image_mode=None,
                sources=["upload"],
                height=200,
                visible=model.has_pictures,
            )
        with gr.Column(scale=3, min_width=480):
            noised = gr.HTML(elem_id="noised", elem_classes="show", min_height=300)
            numbers = gr.HTML(elem_id="numbers", elem_classes="show")
    forward = {"fn": handlers.show_noised, "inputs": [upload, timestep, seed], "outputs": [noised, numbers]}
    _show_while_changed(forward, timestep, seed, upload)
    return forward


def _show_while_changed(event: dict[str, Any], *controls: Any) -> None:
    """Let an event follow controls. While a slider moves, only its last position matters."""
    for control in controls:
        control.change(**event, show_progress="hidden", trigger_mode="always_last", api_visibility="private")


def _steps(model: Model) -> gr.Slider:
    is_free = not model.is_step_denoiser
    return gr.Slider(1, model.max_steps, model.default_steps, step=1, label="Steps", interactive=is_free)


def _label(model: Model, value: int) -> gr.Dropdown:
    labels, is_class = model.pipeline.labels, model.pipeline.classes is not None
    return gr.Dropdown(
        model.label_choices,
        value=value,
        label="Class" if is_class else "Label",
        info=None if is_class else f"Choose one, or type another: {labels}",
        allow_custom_value=not is_class,
        visible=labels is not None,
    )


def _guidance_scale(model: Model) -> gr.Slider:
    scale = model.default_guidance.scale
    low, high = min(1, scale), max(5, scale)
    return gr.Slider(
        low, high, scale, step=0.1, label="Guidance", info="1 is no guidance.", visible=model.can_be_guided
    )


if __name__ == "__main__":
    # The fonts are those of the system: gradio's themes fetch theirs from elsewhere.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build(MODEL).launch(theme=theme, css=CSS, footer_links=["gradio"], ssr_mode=False, show_error=True)
