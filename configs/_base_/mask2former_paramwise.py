"""Mask2Former's parameter groups: the backbone learns at a tenth of the rate, embeddings have no weight decay."""

paramwise_cfg = dict(
    custom_keys=dict(
        backbone=dict(lr_mult=0.1),
        query_embed=dict(decay_mult=0.0),
        query_feat=dict(decay_mult=0.0),
        level_embed=dict(decay_mult=0.0),
    ),
)
