"""Window and image sizes in the names of released checkpoints."""

from __future__ import annotations

import re

# window12to16_192to256, window8-256, and not window16_36e or window8_20240131
SIZES = re.compile(r'window(\d+)(?:to(\d+))?[_-](\d{3,4})(?:to(\d{3,4}))?(?![0-9A-Za-z])')


def sizes_in_name(name: str) -> tuple[int, int, int, int] | None:
    """The windows in tokens before and after fine-tuning, and the image sizes in pixels before and after.

    Returns:
        tuple[int]: ``window12to16_192to256`` gives 12, 16, 192, 256. None if the name has no sizes.
    """
    match = SIZES.search(name)
    if not match:
        return None
    window, new_window, image, new_image = match.groups()
    return int(window), int(new_window or window), int(image), int(new_image or image)


def limit_to_maps(window: int, image: int, num_stages: int, patch_size: int) -> tuple[int, ...] | None:
    """The window of every stage, which is at most as large as the map of its stage.

    Args:
        window (int): window size in tokens.
        image (int): height or width of the image in pixels.
        num_stages (int): number of stages.
        patch_size (int): stride of the first stage in pixels.

    Returns:
        tuple[int]: window sizes in tokens, one per stage. None if the window or a map is empty.
    """
    maps = [image // patch_size // 2**i for i in range(num_stages)]
    return tuple(min(window, size) for size in maps) if window > 0 and min(maps) > 0 else None
