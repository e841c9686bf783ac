"""Parameter groups: layer-wise learning rates, and which parameters have no weight decay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from numbers import Real

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import Tensor, nn

from ..backbone import SwinTransformerV2
from ..position_bias import POSITION_BIASES

# Parts of the names of parameters without weight decay. Norms and biases are known by their shape and ending.
NO_DECAY = ('logit_scale', *(bias.name for bias in POSITION_BIASES.values()))
MULTIPLIERS = {'lr_mult', 'decay_mult'}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class SwinV2OptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Parameter groups for a detector or segmentor whose backbone is a `SwinTransformerV2`.

    Norms, biases, logit scales and position biases have no weight decay, in the whole model (`has_weight_decay`).
    With a ``decay_rate`` below 1 the learning rate falls from block to block towards the image (`distances_to_head`).

    Args:
        optim_wrapper_cfg (dict): the optim wrapper, with an ``optimizer`` that has ``lr`` and ``weight_decay``.
        paramwise_cfg (dict, optional): ``decay_rate`` (float, 1 by default), the learning rate of a block over that of
            the next one. ``custom_keys`` (dict) maps parts of parameter names to dicts with ``lr_mult`` and
            ``decay_mult``, factors of the parameter's learning rate and weight decay. If several parts are in a name,
            the longest counts.

    Raises:
        ValueError: an option is unknown or out of range; on building the optimizer also if a key of ``custom_keys`` is
            in no parameter name, or the model has no `SwinTransformerV2`.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        options = {'decay_rate': 1.0, 'custom_keys': {}}
        unknown = [name for name in paramwise_cfg or {} if name not in options]
        if unknown:
            raise ValueError(
                f'paramwise_cfg of {type(self).__name__} takes {" and ".join(options)}, got {unknown[0]!r}: drop what '
                "a host's recipe has there with paramwise_cfg=dict(_delete_=True, ...)"
            )
        options.update({name: value for name, value in (paramwise_cfg or {}).items() if value is not None})
        super().__init__(optim_wrapper_cfg, options)
        # A plain dict: the groups of a ConfigDict would be ConfigDicts too, which torch.compile does not take.
        self.optimizer_cfg = dict(self.optimizer_cfg)
        self.decay_rate, self.custom_keys = self.paramwise_cfg['decay_rate'], self.paramwise_cfg['custom_keys']
        if self.base_lr is None or self.base_wd is None:
            raise ValueError(f'optimizer must have lr and weight_decay, got {self.optimizer_cfg!r}')
        if not isinstance(self.decay_rate, Real) or not 0 < self.decay_rate <= 1:
            raise ValueError(f'decay_rate must be more than 0 and at most 1, got {self.decay_rate!r}')
        for key, multipliers in self.custom_keys.items():
            numbers = multipliers.values() if isinstance(multipliers, Mapping) else [None]
            if not all(isinstance(number, Real) for number in numbers) or not set(multipliers) <= MULTIPLIERS:
                raise ValueError(
                    f'custom_keys[{key!r}] must be a dict of numbers lr_mult and decay_mult, got {multipliers!r}'
                )

    def add_params(self, params: list[dict], module: nn.Module) -> None:
        """Append a group for each pair of learning rate and weight decay, and log them.

        Args:
            params (list[dict]): the groups of the optimizer.
            module (nn.Module): the whole model.
        """
        parameters = dict(module.named_parameters())
        for key in self.custom_keys:
            if not any(key in name for name in parameters):
                raise ValueError(f'custom_keys has {key!r}, which is in no parameter name: correct or drop it')
        distances = distances_to_head(module)
        members = defaultdict(list)
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                custom = self._custom(name)
                rate = self.decay_rate ** distances.get(name, 0) * custom.get('lr_mult', 1)
                decay = custom.get('decay_mult', 1) if has_weight_decay(name, parameter) else 0
                members[self.base_lr * rate, self.base_wd * decay].append(parameter)
        groups = [dict(params=members[key], lr=key[0], weight_decay=key[1]) for key in sorted(members, reverse=True)]
        lines = [f'{g["lr"]:13.3g} {g["weight_decay"]:12.3g} {len(g["params"]):7}' for g in groups]
        print_log('\n'.join(['Optimizer:\nlearning rate weight decay tensors', *lines]), logger='current')
        params.extend(groups)

    def _custom(self, name):
        return self.custom_keys.get(max((key for key in self.custom_keys if key in name), key=len, default=None), {})


def has_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether a parameter decays, as in the official ``optimizer.py``: no vector, bias, logit scale, position bias."""
    return parameter.ndim > 1 and not name.endswith('.bias') and not any(part in name for part in NO_DECAY)


def distances_to_head(model: nn.Module) -> dict[str, int]:
    """How many layers each parameter of the backbones is away from the head, by name in the model.

    As in the official SimMIM fine-tuning: 1 for the last block, one more for each block before it, counted through all
    stages, and one more for the patch embedding. A patch merging counts with the block before it, and an output norm is
    left out: it goes with the head.

    Raises:
        ValueError: the model has no `SwinTransformerV2`.
    """
    backbones = {name: module for name, module in model.named_modules() if isinstance(module, SwinTransformerV2)}
    if not backbones:
        raise ValueError(f'{type(model).__name__} has no SwinTransformerV2: leave the constructor of optim_wrapper out')
    distances = {}
    for prefix, backbone in backbones.items():
        depths, depth = {'patch_embed': 0}, 0
        for i, stage in enumerate(backbone.layers):
            for j in range(len(stage.blocks)):
                depth += 1
                depths[f'layers.{i}.blocks.{j}'] = depth
            depths[f'layers.{i}.downsample'] = depth
        head = depth + 1
        for layer, depth in depths.items():
            for name, _ in backbone.get_submodule(layer).named_parameters():
                distances['.'.join(filter(None, (prefix, layer, name)))] = head - depth
    return distances
