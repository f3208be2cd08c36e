"""A training loop of one's own: own images, own network, and a checkpoint that stock diffusers loads.

    python examples/own_loop.py [STEPS] [FOLDER]

The images are 16x16 pictures of one bright disk each. `Objective` is the loss, `DDPMScheduler` the mathematics.
"""

import sys

import diffusers
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler, Objective, show

SIZE, BATCH_SIZE = 16, 64


def draw_disks(count: int) -> torch.Tensor:
    """Draw images of a disk each, (count, 1, SIZE, SIZE) in [-1, 1]; a data set of yours takes its place."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    y, x, radius = (torch.empty(count, 1, 1).uniform_(*ends) for ends in ((5, 11), (5, 11), (2, 4)))
    distance = ((rows - y) ** 2 + (columns - x) ** 2).sqrt()
    return (2 * (radius - distance)).clamp(-1, 1).unsqueeze(1)


def main(num_steps: int = 600, folder: str = "disks") -> None:
    """Train, save, load with stock diffusers, and draw."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    network = diffusers.UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    objective = Objective(scheduler, weighting="min_snr")
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for step in range(1, num_steps + 1):
        loss = objective(network, draw_disks(BATCH_SIZE)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == num_steps:
            print(f"step {step} of {num_steps}, loss {loss.item():.4f}")

    DDPMPipeline(network, scheduler).save_pretrained(folder)
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    show(pipeline(batch_size=16, num_inference_steps=50).images).save(f"{folder}/samples.png")
    print(f"The model is in {folder}. Stock diffusers loaded it, and drew {folder}/samples.png.")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 600, *sys.argv[2:3])
