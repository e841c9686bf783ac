"""Weights of a whole model are loaded all of them or none, whichever implementation its backbone was trained with."""

import copy

import pytest
import torch
from mmengine.model import BaseModel, BaseTTAModel
from torch import nn

from swinv2_mm import CheckpointError, SwinTransformerV2
from swinv2_mm.engine.model_weights import load_model

ARCH = dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))


class Model(nn.Module):
    """A backbone and a head, with a counter and a buffer that is infinite."""

    def __init__(self, classes=3, backbone=None, **kwargs):
        super().__init__()
        self.backbone = backbone or SwinTransformerV2(ARCH, window_size=4, **kwargs)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, classes))
        self.register_buffer('ranges', torch.tensor([0.0, float('inf')]))


@pytest.fixture
def build(randomize):
    return lambda *args, **kwargs: randomize(Model(*args, **kwargs))


@pytest.fixture
def trained(build):
    """A checkpoint as a Runner writes it."""
    model = build()
    model.head[1].num_batches_tracked.fill_(7)
    return {'state_dict': model.state_dict(), 'meta': {'iter': 7}}


def assert_same(model, state_dict):
    assert model.state_dict().keys() == state_dict.keys()
    for name, value in state_dict.items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize('transfer', [False, True])
@pytest.mark.parametrize('wrapped', ['state_dict', 'bare', 'module.', 'model', 'model.'])
def test_all_weights_are_loaded(build, trained, transfer, wrapped):
    state_dict, model = trained['state_dict'], build()
    file = {
        'state_dict': trained,
        'bare': state_dict,
        'module.': {'state_dict': {f'module.{name}': value for name, value in state_dict.items()}},
        'model': {'model': state_dict},
        'model.': {'state_dict': {'loss.weight': torch.ones(1)} if transfer else {}},  # as of Lightning
    }[wrapped]
    if wrapped == 'model.':
        file['state_dict'].update({f'model.{name}': value for name, value in state_dict.items()})
    report = load_model(model, file, 'run.pth', transfer=transfer)
    assert_same(model, state_dict)
    assert set(report.loaded) == set(state_dict)
    assert report.converted == report.initial == {}
    assert set(report.left_out) == ({'loss.weight'} if transfer and wrapped == 'model.' else set())
    assert str(report).startswith('Loaded run.pth into Model\n  loaded ')


def dropped(weights, name):
    del weights[name]


def renamed(weights, name):
    weights[f'{name}s'] = weights.pop(name)


def reshaped(weights, name):
    weights[name] = weights[name].flatten()[:-1]


def transposed(weights, name):
    weights[name] = weights[name].movedim(0, -1)


def of_integers(weights, name):
    weights[name] = weights[name].to(torch.int64)


def of_nan(weights, name):
    weights[name] = weights[name].clone()
    weights[name].flatten()[0] = float('nan')


def sparse(weights, name):
    weights[name] = weights[name].to_sparse()


DAMAGES = [dropped, renamed, reshaped, transposed, of_integers, of_nan, sparse]
PLACES = ['backbone.layers.2.blocks.1.mlp.fc1.weight', 'backbone.norm0.weight', 'head.2.weight', 'head.1.running_var']


@pytest.mark.parametrize('name', PLACES)
@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_leaves_the_model_as_it_is(build, trained, name, damage):
    if damage is transposed and trained['state_dict'][name].ndim == 1:
        pytest.skip('it has one dimension')
    damage(trained['state_dict'], name)
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r'^checkpoint run\.pth: [^\n]+$') as error:
        load_model(model, trained, 'run.pth')
    assert name.partition('.')[2] in str(error.value)
    assert_same(model, before)


@pytest.mark.parametrize('file', [{}, {'state_dict': {}}, {'meta': {'iter': 3}}], ids=str)
def test_a_file_without_weights_is_refused(build, file):
    with pytest.raises(CheckpointError, match='holds no tensors by name'):
        load_model(build(), file, 'run.pth')


def test_a_backbone_alone_is_told_what_it_is_for(build, trained):
    backbone = {name[9:]: value for name, value in trained['state_dict'].items() if name.startswith('backbone.')}
    with pytest.raises(CheckpointError, match=r'it lacks backbone\.\S+ and .* --checkpoint loads the weights'):
        load_model(build(), {'state_dict': backbone}, 'run.pth', transfer=True)


def test_a_counter_that_no_forward_pass_uses_may_be_missing(build, trained):
    del trained['state_dict']['head.1.num_batches_tracked']
    report = load_model(build(), trained, 'run.pth')
    assert list(report.initial) == ['head.1.num_batches_tracked']


# ---------------------------------------------------------------- transfer


def test_a_transfer_leaves_heads_out_and_says_so(build, trained):
    model = build(classes=5)
    model.extra = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    trained['state_dict']['old_head.weight'] = torch.ones(2)
    report = load_model(model, trained, 'run.pth', transfer=True)
    assert report.left_out == {
        'head.2.weight': 'of another shape than in the Model',
        'head.2.bias': 'of another shape than in the Model',
        'old_head.weight': 'not in the model',
    }
    assert set(report.initial) == {'head.2.weight', 'head.2.bias', 'extra.weight', 'extra.bias'}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in report.initial else trained['state_dict'][name]), name


@pytest.mark.parametrize('damage', [dropped, renamed, reshaped, of_integers, of_nan])
@pytest.mark.parametrize('name', PLACES[:2])
def test_a_transfer_takes_a_whole_backbone_alone(build, trained, name, damage):
    """Unless the part is named, which is only for what is missing or of another shape."""
    damage(trained['state_dict'], name)
    model = build()
    before = copy.deepcopy(model.state_dict())
    if damage is dropped and name == 'backbone.norm0.weight':
        assert 'backbone.norm0.bias' in trained['state_dict']  # half of an output norm is damage
    with pytest.raises(CheckpointError):
        load_model(model, trained, 'run.pth', transfer=True)
    assert_same(model, before)
    if damage in (dropped, reshaped):
        report = load_model(model, trained, 'run.pth', transfer=True, allow_missing=[name])
        assert list(report.initial) == [name]
        assert torch.equal(model.state_dict()[name], before[name])
        assert torch.equal(model.head[2].weight, trained['state_dict']['head.2.weight'])


def test_a_transfer_without_the_backbone_is_allowed_by_its_name(build, trained):
    heads = {name: value for name, value in trained['state_dict'].items() if not name.startswith('backbone.')}
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r'it lacks backbone\.'):
        load_model(model, {'state_dict': heads}, 'run.pth', transfer=True)
    load_model(model, {'state_dict': heads}, 'run.pth', transfer=True, allow_missing=['backbone'])
    assert_same(model, {**before, **heads})


def test_what_allow_missing_names_must_be_there(build, trained):
    with pytest.raises(CheckpointError, match=r"allow_missing names 'backbon', and the model has no such"):
        load_model(build(), trained, 'run.pth', transfer=True, allow_missing=['backbon'])


@pytest.mark.parametrize('damage', [of_integers, of_nan])
def test_a_transfer_takes_no_damaged_head(build, trained, damage):
    damage(trained['state_dict'], 'head.0.weight')
    with pytest.raises(CheckpointError, match=r'head\.0\.weight'):
        load_model(build(), trained, 'run.pth', transfer=True)


def test_another_backbone_must_be_whole_too(build):
    source = build(backbone=nn.Conv2d(3, 8, 3))
    file = {'state_dict': source.state_dict()}
    model = build(backbone=nn.Conv2d(3, 8, 5))
    with pytest.raises(CheckpointError, match=r'backbone\.weight has shape'):
        load_model(model, file, 'run.pth', transfer=True)
    renamed(file['state_dict'], 'backbone.weight')
    with pytest.raises(CheckpointError, match=r'lacks backbone\.weight'):
        load_model(build(backbone=nn.Conv2d(3, 8, 3)), file, 'run.pth', transfer=True)


# ---------------------------------------------------------------- other implementations


@pytest.fixture
def ported(trained):
    """The same detector as one with another implementation would be saved, by the implementation."""
    from swinv2_mm.checkpoints.formats import export  # tested against the libraries themselves

    weights = trained['state_dict']
    backbone = {name[len('backbone.') :]: value for name, value in weights.items() if name.startswith('backbone.')}
    heads = {name: value for name, value in weights.items() if not name.startswith('backbone.')}
    norms = {name: value for name, value in backbone.items() if name[:5] in ('norm0', 'norm1', 'norm2')}

    def port(to):
        theirs = {**export(backbone, (4, 4, 4, 4), to), **norms}
        return {'state_dict': {**{f'backbone.{name}': value for name, value in theirs.items()}, **heads}}

    return port


@pytest.mark.parametrize('transfer', [False, True])
def test_a_model_of_the_official_code_ported_is_loaded_with_its_heads(build, trained, ported, transfer):
    file = ported('official')
    file['state_dict']['backbone.layers.0.blocks.0.attn.relative_position_index'] = torch.zeros(16, 16).long()
    model = build()
    report = load_model(model, file, 'run.pth', transfer=transfer)
    assert_same(model, trained['state_dict'])
    assert set(report.left_out.values()) == {'computed anew'}


@pytest.mark.parametrize('to', ['timm', 'transformers'])
def test_a_model_of_a_port_is_loaded_with_its_heads_where_its_windows_are_given(build, trained, ported, to):
    with pytest.raises(CheckpointError, match='nothing says the windows that each stage was trained with'):
        load_model(build(), ported(to), 'run.pth')
    model = build(pretrained_window_sizes=4)
    load_model(model, ported(to), 'run.pth')
    assert_same(model, trained['state_dict'])


@pytest.mark.parametrize('to', ['official', 'timm', 'transformers'])
def test_the_hosts_load_a_port_too(build, trained, ported, to):
    """By mmengine's function and by PyTorch's, which ask the backbone."""
    from mmengine.runner.checkpoint import load_state_dict

    weights = ported(to)['state_dict']
    names = list(weights)
    for load in (load_state_dict, nn.Module.load_state_dict):
        model = build()
        load(model, weights, strict=True)
        assert_same(model, trained['state_dict'])
        assert list(weights) == names


def test_the_windows_of_a_port_are_kept(build, ported):
    model = build(backbone=SwinTransformerV2(ARCH, window_size=8))
    load_model(model, ported('official'), 'run.pth')
    assert model.backbone.pretrained_window_sizes == (4, 4, 4, 4)
    assert model.backbone.window_size == (8, 8, 8, 8)


def test_names_of_no_known_implementation_are_refused(build, trained):
    """As of a class whose parts have names of two libraries."""
    weights = trained['state_dict']
    weights.pop('backbone.pretrained_windows')
    names = {
        name: name.replace('backbone.layers', 'backbone.stages').replace('.attn.', '.attn.w_msa.') for name in weights
    }
    file = {'state_dict': {names[name]: value for name, value in weights.items()}}
    for transfer in (False, True):
        with pytest.raises(CheckpointError, match='holds weights of a Swin V2, but in none of the known formats'):
            load_model(build(), file, 'run.pth', transfer=transfer)


def test_two_backbones_of_a_model_get_weights_of_their_own(randomize):
    def pair():
        return randomize(nn.ModuleDict({'teacher': Model(), 'student': Model()}))

    source, model = pair(), pair()
    load_model(model, {'state_dict': source.state_dict()}, 'run.pth')
    assert_same(model, source.state_dict())


# ---------------------------------------------------------------- the hosts


class TTA(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return data_samples_list


class Detector(BaseModel, Model):
    def __init__(self):
        BaseModel.__init__(self)
        model = Model()
        self.backbone, self.head = model.backbone, model.head
        self.register_buffer('ranges', model.ranges)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return inputs


def test_a_model_is_loaded_within_its_test_time_augmentation(trained):
    augmented = TTA(Detector())
    load_model(augmented, trained, 'run.pth')
    assert_same(augmented.module, trained['state_dict'])


class Semi(nn.Module):
    """A teacher and a student that take the weights of one model, as mmdet's semi-supervised detectors do."""

    def __init__(self):
        super().__init__()
        self.teacher, self.student = Model(), Model()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if not any(name.startswith(('teacher.', 'student.')) for name in state_dict):
            for name, value in list(state_dict.items()):
                state_dict.update({f'teacher.{name}': value, f'student.{name}': value})
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_a_model_that_renames_its_weights_is_loaded_whole_all_the_same(build, trained, randomize):
    model = randomize(Semi())
    load_model(model, trained, 'run.pth', transfer=True)
    for part in (model.teacher, model.student):
        assert_same(part, trained['state_dict'])
    model = randomize(Semi())
    before = copy.deepcopy(model.state_dict())
    del trained['state_dict']['backbone.layers.0.blocks.0.mlp.fc1.weight']
    with pytest.raises(
        CheckpointError, match=r'it lacks teacher\.backbone\.layers\.0\.blocks\.0\.mlp\.fc1\.weight and 1 more'
    ):
        load_model(model, trained, 'run.pth', transfer=True)
    assert_same(model, before)


def test_what_users_add_to_the_backbone_is_theirs(randomize):
    """PyTorch's own loading is as strict as it is asked to be."""
    backbone = randomize(SwinTransformerV2(ARCH, window_size=4))
    weights = backbone.state_dict()
    extra = {**weights, 'adapter.bn.num_batches_tracked': torch.tensor(3), 'head.weight': torch.ones(1)}
    other = SwinTransformerV2(ARCH, window_size=4)
    assert set(other.load_state_dict(extra, strict=False).unexpected_keys) == set(extra) - set(weights)
    assert_same(other, weights)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"head\.weight"'):
        other.load_state_dict(extra)

    class Counting(SwinTransformerV2):
        def get_extra_state(self):
            return {'calls': 3}

        def set_extra_state(self, state):
            self.calls = state['calls']

    counting = Counting(ARCH, window_size=4)
    counting.load_state_dict(Counting(ARCH, window_size=4).state_dict())
    assert counting.calls == 3
