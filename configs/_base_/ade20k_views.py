"""Views for test-time augmentation on ADE20K, by the size of the crops that a model is trained with.

The host's views are relative to the size of the image. In the papers they are relative to the scale of training.
"""

views = {
    f'crops_{size}': [
        dict(type='Resize', scale=(int(4 * size * ratio), int(size * ratio)), keep_ratio=True)
        for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    ]
    for size in (512, 640)
}
