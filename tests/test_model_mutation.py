"""Damaged checkpoints of whole runs, through every entry: they load whole and right, or not at all, in one line.

What is right is computed here name by name from what the damaged file holds, and shares nothing with the package.
"""

import copy
import math
import random
from collections import Counter

import pytest
import torch
from draws import DRAWS
from entries import ENTRIES
from mmengine.logging import MessageHub
from mmengine.optim import LinearLR, OptimWrapper
from torch import nn

from swinv2_mm import CheckpointError, SwinTransformerV2, load_pretrained
from swinv2_mm.checkpoints.fitting import check_complete
from swinv2_mm.checkpoints.loading import read_weights
from swinv2_mm.engine.model_weights import load_model
from swinv2_mm.engine.training_state import check_training_state

ARCH = dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2))


class Model(nn.Module):
    """A small backbone with a neck and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = SwinTransformerV2(ARCH, window_size=4, out_indices=(0, 1))
        self.neck = nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)


class Run:
    """A model in training, and what a Runner saves of it."""

    def __init__(self, randomize, steps):
        self.model = randomize(Model())
        self.optimizer = torch.optim.AdamW(
            [dict(params=self.model.backbone.parameters()), dict(params=[*self.model.neck.parameters()], lr=1e-4)]
        )
        self.wrapper = OptimWrapper(self.optimizer)
        self.schedulers = [LinearLR(self.optimizer, start_factor=0.1)]
        for _ in range(steps):
            for parameter in self.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            self.optimizer.step()
            self.schedulers[0].step()

    def checkpoint(self):
        hub = MessageHub('mutation')
        hub.update_scalar('train/loss', 2.5)
        return copy.deepcopy(
            {
                'meta': {
                    'epoch': 0,
                    'iter': 3,
                    'seed': 0,
                    'num_optimizer_states': len(self.optimizer.state),
                    'dataset_meta': {'classes': ('a', 'b', 'c')},
                },
                'state_dict': self.model.state_dict(),
                'message_hub': hub.state_dict(),
                'optimizer': self.wrapper.state_dict(),
                'param_schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
            }
        )


# ---------------------------------------------------------------- damages


def names(draw, file):
    return draw.choice([name for name in tensors_in(file) if not name.endswith('num_batches_tracked')])


def tensors_in(file):
    """What no other damage has replaced."""
    return {name: value for name, value in file['state_dict'].items() if isinstance(value, torch.Tensor)}


def drop(draw, file):
    del file['state_dict'][names(draw, file)]


def drop_part(draw, file):
    part = names(draw, file).rpartition('.')[0].rsplit('.', draw.randrange(3))[0]
    file['state_dict'] = {name: value for name, value in file['state_dict'].items() if not name.startswith(part)}


def rename(draw, file):
    name = names(draw, file)
    other = draw.choice(
        (f'{name}s', name[:-1], f'x.{name}', name.replace('.', '_'), name.replace('backbone', 'encoder'))
    )
    file['state_dict'][other] = file['state_dict'].pop(name)


def rename_part(draw, file):
    old, new = draw.choice((('backbone.', 'model.'), ('neck.', 'fpn.'), ('mlp.', 'ffn.'), ('layers.1.', 'layers.2.')))
    file['state_dict'] = {name.replace(old, new): value for name, value in file['state_dict'].items()}


def reshape(draw, file):
    name = names(draw, file)
    value = file['state_dict'][name]
    forms = value.flatten(), value[None], value.movedim(0, -1), value.flatten()[:-1], torch.cat([value.flatten()] * 2)
    file['state_dict'][name] = draw.choice([form for form in forms if form.shape != value.shape]).clone()


def cast(draw, file):
    name = names(draw, file)
    dtype = draw.choice((torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float16, torch.float64))
    file['state_dict'][name] = file['state_dict'][name].to(dtype)


def spoil(draw, file):
    value = draw.choice([value for value in tensors_in(file).values() if value.is_floating_point() and value.numel()])
    value.view(-1)[draw.randrange(value.numel())] = draw.choice((math.nan, math.inf, -math.inf))


def empty(draw, file):
    file['state_dict'] = {}


def replace(draw, file):
    file['state_dict'][names(draw, file)] = draw.choice((None, 3, 'text', [1.0], {'a': torch.ones(1)}))


def add(draw, file):
    file['state_dict'][draw.choice(('neck.2.weight', 'backbone.norm7.weight', 'other', 'backbone.x'))] = torch.rand(2)


def lose_key(draw, file):
    file.pop(draw.choice(list(file)))


def damage_meta(draw, file):
    key = draw.choice(('epoch', 'iter'))
    value = draw.choice((None, -1, 'three', 2.5, [3], True))
    file['meta'] = draw.choice(({**file['meta'], key: value}, {}, None, 7))


def damage_optimizer(draw, file):
    state, groups = file['optimizer']['state'], file['optimizer']['param_groups']
    entry = draw.choice(list(state.values()))
    key = draw.choice(('exp_avg', 'exp_avg_sq', 'step'))
    draw.choice(
        (
            lambda: entry.pop(key),
            lambda: state.pop(draw.choice(list(state))),
            lambda: entry.update({key: entry[key].flatten()[:0]}) if key != 'step' else entry.pop(key),
            lambda: entry.update({key: torch.full_like(entry[key], math.nan)}),
            lambda: entry.update({key: None}),
            lambda: groups.pop(),
            lambda: groups[0]['params'].pop(),
            lambda: groups[0].update(lr=math.nan),
            lambda: state.clear(),
            lambda: state.update({999: entry}),
            lambda: file.update(optimizer={}),
            lambda: file.update(optimizer=None),
        )
    )()


def damage_schedulers(draw, file):
    states = file['param_schedulers']
    draw.choice(
        (
            lambda: states.pop(),
            lambda: states.append(states[0]),
            lambda: states[0].pop('last_step'),
            lambda: states[0].update(last_step='x'),
            lambda: file.update(param_schedulers={}),
        )
    )()


def damage_hub(draw, file):
    file['message_hub'] = draw.choice(({}, None, {'log_scalars': {}}, {**file['message_hub'], 'log_scalars': {'a': 1}}))


OF_WEIGHTS = drop, drop_part, rename, rename_part, reshape, cast, spoil, empty, replace, add
OF_STATE = lose_key, damage_meta, damage_optimizer, damage_schedulers, damage_hub


# ---------------------------------------------------------------- what is right


WINDOWS = 'backbone.pretrained_windows'


def tensors_of(file):
    weights = file.get('state_dict') or {}
    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    if WINDOWS in tensors and tensors[WINDOWS].is_floating_point() and tensors[WINDOWS].tolist() == [4, 4]:
        tensors[WINDOWS] = tensors[WINDOWS].long()  # they are no weights: any type that holds them will do
    return tensors


def is_good(value, own):
    """Whether a tensor may take the place of one of a model, but for its shape."""
    same_kind = value.is_floating_point() == own.is_floating_point()
    return same_kind and not value.is_complex() and value.dtype != torch.bool and bool(value.isfinite().all())


def assert_weights(model, expected):
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


def check_loading(file, run, before, whole, expected, transfer):
    """Load a model, which must succeed if what it takes is whole, and change nothing else."""
    try:
        load_model(run.model, file, 'run.pth', transfer=transfer)
    except CheckpointError as error:
        assert '\n' not in str(error)
        assert not whole, error
        assert_weights(run.model, before)
        return False
    assert whole
    assert_weights(run.model, {**before, **expected})
    return True


def check_strict(file, run, before):
    """All weights are needed, and no other; a count that no forward pass uses may be missing."""
    weights = tensors_of(file)
    whole = set(before) - {'neck.1.num_batches_tracked'} <= set(weights) <= set(before)
    whole = whole and all(v.shape == before[name].shape and is_good(v, before[name]) for name, v in weights.items())
    return check_loading(file, run, before, whole, weights, transfer=False)


def check_transfer(file, run, before):
    """The backbone is needed, less output norms that are missing as a whole; of the others what fits is taken."""
    weights = tensors_of(file)
    norms = [{f'backbone.norm{i}.weight', f'backbone.norm{i}.bias'} for i in (0, 1)]
    left = {name for norm in norms if not norm & set(weights) for name in norm}
    theirs = {name: value for name, value in weights.items() if name.startswith('backbone.')}
    whole = set(theirs) == {name for name in before if name.startswith('backbone.')} - left
    whole = whole and all(value.shape == before[name].shape for name, value in theirs.items())
    others = {name: value for name, value in weights.items() if name in before and name not in theirs}
    taken = {**theirs, **{name: value for name, value in others.items() if value.shape == before[name].shape}}
    whole = whole and all(is_good(value, before[name]) for name, value in taken.items())
    return check_loading(file, run, before, whole, taken, transfer=True)


def check_backbone(file, run, before):
    """The backbone alone: by `load_pretrained`, and by what the checkpoint tools check."""
    loaded = []
    for entry in ('load_pretrained', 'tools'):
        try:
            if entry == 'tools':
                check_complete(*read_weights(file), SwinTransformerV2)
            else:
                load_pretrained(run.model.backbone, file)
            loaded.append(True)
        except CheckpointError as error:
            assert '\n' not in str(error)
            loaded.append(False)
    theirs = {n.replace('model.', 'backbone.', 1): v for n, v in tensors_of(file).items()}  # under any name
    expected = {**before, **{n: v for n, v in theirs.items() if n.startswith('backbone.')}}
    assert_weights(run.model, expected if loaded[0] else before)
    return loaded[0]


def check_resume(file, run, good):
    """What is damaged here makes no state that training could go on from, but for what the file has too much."""
    try:
        check_training_state(file, 'run.pth', run.wrapper, run.schedulers)
    except CheckpointError as error:
        assert '\n' not in str(error)
        return False
    run.wrapper.load_state_dict(file['optimizer'])
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())
    state = file['optimizer']['state']
    assert len(state) == len(good['optimizer']['state'])
    assert len(file['param_schedulers']) == 1 and file['meta']['iter'] >= 0 and file['meta']['epoch'] >= 0
    return True


@pytest.mark.parametrize('entry', ['test, infer and --resume', 'load_from', 'a backbone', 'training state'])
def test_a_damaged_run_loads_whole_or_not_at_all(randomize, entry):
    source, outcomes = Run(randomize, steps=3), Counter()
    good = source.checkpoint()
    run = Run(randomize, steps=0)
    before = copy.deepcopy(run.model.state_dict())
    for i in range(250 * DRAWS):
        draw = random.Random(i)
        file = copy.deepcopy(good)
        damages = draw.sample(OF_STATE if entry == 'training state' else OF_WEIGHTS, draw.choice((0, 1, 1, 1, 2)))
        for damage in damages:
            if entry == 'training state' or tensors_in(file):
                damage(draw, file) if damage in OF_WEIGHTS or len(file) == len(good) else None
        if entry == 'training state':
            loaded = check_resume(file, Run(randomize, steps=0), good)
        else:
            check = {'load_from': check_transfer, 'a backbone': check_backbone}.get(entry, check_strict)
            loaded = check(file, run, before)
            run.model.load_state_dict(before)
        if not damages:
            assert loaded
        outcomes[loaded] += 1
    print(f'{entry}: {sum(outcomes.values())} damaged checkpoints, {outcomes[True]} loaded, none wrongly')
    assert min(outcomes[True], outcomes[False]) >= 20


@pytest.mark.parametrize('entry', ['--resume', 'load_from', 'test', 'infer'])
def test_a_command_line_ends_with_one_line_where_a_checkpoint_is_damaged(
    trained_segmentor, no_traces, load_tool, shapes, tmp_path, capfd, entry
):
    damages = [drop, reshape, spoil, empty, rename_part] if entry != '--resume' else [*OF_WEIGHTS, *OF_STATE]
    for i in range(3 * DRAWS):
        draw = random.Random(f'{entry} {i}')
        file = copy.deepcopy(trained_segmentor)
        damage = draw.choice(damages)
        damage(draw, file)
        torch.save(file, tmp_path / 'run.pth')
        folder = tmp_path / f'results_{i}'
        folder.mkdir()
        code = ENTRIES[entry](str(tmp_path / 'run.pth'), load_tool=load_tool, shapes=shapes, tmp_path=folder)
        error = capfd.readouterr().err
        assert code in (0, 2) and 'Traceback' not in error, (damage.__name__, error)
        if code == 0:  # a backbone that is whole may be transferred, and a cast to another precision is no damage
            assert entry == 'load_from' or damage is cast, damage.__name__
        assert not list(folder.rglob('iter_2.pth')) or code == 0


def with_names_of_another_class(file):
    """What a class whose parts are called otherwise than in every known layout would have saved."""
    del file['state_dict'][WINDOWS]
    names = {name: name.replace('backbone.layers', 'backbone.stages') for name in file['state_dict']}
    names = {name: other.replace('.attn.', '.attn.w_msa.') for name, other in names.items()}
    file['state_dict'] = {names[name]: value for name, value in file['state_dict'].items()}


@pytest.mark.parametrize('entry', ['--resume', 'load_from', 'test', 'infer'])
def test_no_command_line_goes_on_with_a_random_backbone(
    trained_segmentor, no_traces, load_tool, shapes, tmp_path, capfd, entry
):
    file = copy.deepcopy(trained_segmentor)
    with_names_of_another_class(file)
    torch.save(file, tmp_path / 'other.pth')
    code = ENTRIES[entry](str(tmp_path / 'other.pth'), load_tool=load_tool, shapes=shapes, tmp_path=tmp_path)
    error = capfd.readouterr().err
    assert code == 2 and 'Traceback' not in error
    assert 'it holds weights of a Swin V2, but in none of the known formats' in error


def test_a_segmentor_of_the_official_code_ported_gives_what_ours_gives(
    trained_segmentor, no_traces, load_tool, shapes, tmp_path
):
    """Its file has tables and indices, and does not say the windows otherwise."""
    file = copy.deepcopy(trained_segmentor)
    windows = file['state_dict'].pop(WINDOWS).tolist()
    for name in list(file['state_dict']):
        if name.startswith('backbone.') and name.endswith('logit_scale'):
            window = windows[int(name.split('.')[2])]
            offsets = torch.arange(1 - window, window, dtype=torch.float32) / (window - 1) * 8
            axis = offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)
            table = torch.stack(torch.meshgrid(axis, axis, indexing='ij'), -1)
            file['state_dict'][name.replace('logit_scale', 'relative_coords_table')] = table[None]
            index = torch.zeros(window**2, window**2, dtype=torch.int64)
            file['state_dict'][name.replace('logit_scale', 'relative_position_index')] = index
    torch.save(file, tmp_path / 'ported.pth')
    torch.save(trained_segmentor, tmp_path / 'ours.pth')
    pictures = []
    for name in ('ours', 'ported'):
        (tmp_path / name).mkdir()
        source = str(tmp_path / f'{name}.pth')
        for entry in ('test', 'infer'):
            assert ENTRIES[entry](source, load_tool=load_tool, shapes=shapes, tmp_path=tmp_path / name) == 0
        pictures.append([path.read_bytes() for path in sorted((tmp_path / name / 'out/labels').iterdir())])
    assert pictures[0] == pictures[1] and len(pictures[0]) == 1
