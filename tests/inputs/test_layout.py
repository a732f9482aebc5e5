import pytest
import torch

from nvlm_kernels import tile_mask_from_ids
from nvlm_runtime.micro.document import GRIDS
from tests.model.test_model import picture
from tests.small import small_engine


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_ids_of_a_prompt_give_its_layouts_intervals(grid):
    """NVLM-X: the tags are in the ids, so the mask from ids and the mask from the layout's spans are one."""
    model = small_engine("x")
    size = model.config.vision.image_size
    images = [picture((grid[0] * size * 2, grid[1] * size * 2)), picture((size, size), 1)]
    prepared = model.prepare("Before, <image> between <image> and after", images)
    encode = model.tokenizer.encode
    tags = [encode(f"<tile_{k}>") for k in range(1, 7)] + [encode("<tile_global_thumbnail>")]
    longest = max(map(len, tags))
    patterns = torch.tensor([tag + [-1] * (longest - len(tag)) for tag in tags])
    ids = torch.tensor([prepared.input_ids])
    found = tile_mask_from_ids(ids, patterns, len(tags) - 1, model.config.tokens_per_tile)[0]
    assert torch.equal(found, prepared.layout.intervals)
