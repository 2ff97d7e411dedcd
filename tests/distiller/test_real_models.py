"""Models as people have them: an unmodified ResNet, and small random ones of `transformers`."""

import copy
import os
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch
from torch import nn

from distill import ATLoss, Distiller, HintLoss, KLLoss, LogitLoss, OFDLoss, ReviewLoss, Term, adapt, ofd_margin
from distill._distiller.taps import Tap, run_with_taps
from models import BasicBlock, ResNet, images

STAGES = ("layer1", "layer2", "layer3", "layer4")


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers", reason="a development dependency")
    transformers.logging.set_verbosity_error()
    return transformers


def first(value):
    """Before transformers 5 some layers give a tuple."""
    return value[0] if isinstance(value, tuple) else value


def seeded(build, *, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def step(distiller, inputs, target=None, **options):
    """One step that must train the student: the terms, once every weight of the student has a finite gradient."""
    out = distiller(inputs, target, **options)
    out.loss.backward()
    assert out.loss.isfinite()
    gradients = [parameter.grad for parameter in distiller.student.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    return out


def before_relu(block, x):
    """A block's sum, without any operation in place."""
    identity = x if block.downsample is None else block.downsample(x)
    out = torch.relu(block.bn1(block.conv1(x)))
    return block.bn2(block.conv2(out)) + identity


def sums(net, x):
    """The sum that every stage's last block gives to its ReLU."""
    x, seen = torch.relu(net.bn1(net.conv1(x))), []
    for stage in STAGES:
        for block in getattr(net, stage):
            before = before_relu(block, x)
            x = torch.relu(before)
        seen.append(before)
    return seen


def published(student, teacher):
    """OFD and Review as published: the maps before the ReLU of each stage's last block."""
    widths = [[getattr(net, stage)[-1].bn2.num_features for stage in STAGES] for net in (student, teacher)]
    sides = tuple(
        tuple(f"{stage}.{len(getattr(net, stage)) - 1}.relu:input#1" for stage in STAGES) for net in (student, teacher)
    )
    norm = teacher.layer4[-1].bn2
    margin = ofd_margin(norm.weight, norm.bias)
    torch.manual_seed(0)
    return {
        "ofd": Term(OFDLoss(widths[0][3], widths[1][3], margin), at=(sides[0][3], sides[1][3]), weight=1e-3, copy=True),
        "review": Term(ReviewLoss(widths[0], widths[1]), at=sides, copy=True),
    }


def test_taps_before_the_relu_of_an_unmodified_resnet_see_the_sum():
    net, (x, _) = ResNet(blocks=2).eval(), images()
    paths = [f"{stage}.1.relu:input#1" for stage in STAGES]
    result, seen = run_with_taps(net, [Tap(path, copy=True) for path in paths], lambda: net(x), side="student")
    assert torch.equal(result, net(x))
    for path, expected in zip(paths, sums(net, x), strict=True):
        torch.testing.assert_close(seen[Tap(path, copy=True)], expected)
        assert (expected < 0).any()
    with pytest.raises(ValueError, match=r"student's tap 'layer4.1.relu:input#1' must not change .* copy=True keeps"):
        run_with_taps(net, [Tap(paths[3])], lambda: net(x), side="student")
    with pytest.raises(
        ValueError, match=r"must be reached once .* 2 times; 'layer4.1.relu:input#0' is the first of them"
    ):
        run_with_taps(net, [Tap("layer4.1.relu:input", copy=True)], lambda: net(x), side="student")


def test_ofd_and_review_as_published_on_unmodified_resnets():
    torch.manual_seed(0)
    student, teacher, (x, y) = ResNet(), ResNet(width=6, blocks=2, seed=1), images()
    terms = published(student, teacher)
    losses = copy.deepcopy({name: term.loss for name, term in terms.items()})
    ours, theirs = sums(copy.deepcopy(student), x), sums(copy.deepcopy(teacher).eval(), x)
    out = step(Distiller(student, teacher, terms), x, y)
    torch.testing.assert_close(out.terms["ofd"], losses["ofd"](ours[3], theirs[3]).detach())
    torch.testing.assert_close(out.terms["review"], losses["review"](tuple(ours), tuple(theirs)).detach())
    assert out.terms["ofd"] > 0


def test_a_compiled_block_sees_the_same_before_its_relu_as_eager():
    torch.compiler.reset()
    torch.manual_seed(0)
    student, teacher = BasicBlock(3, 4, 1), BasicBlock(3, 6, 1)
    terms = {
        "ofd": Term(OFDLoss(4, 6, ofd_margin(teacher.bn2.weight, teacher.bn2.bias)), at="relu:input#1", copy=True),
        "between": Term(HintLoss(4, 6), at="bn1", copy=True),
    }
    eager = Distiller(student, teacher, terms, task_loss=None)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = images(side=6)[0]
    ours, theirs = compiled(x), eager(x)
    torch.testing.assert_close(ours.terms, theirs.terms)
    ours.loss.backward(), theirs.loss.backward()
    for (name, a), (_, b) in zip(twin.named_parameters(), eager.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


def vit(hf):
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    return seeded(lambda: hf.ViTModel(config), seed=1)


def test_vit_teaches_resnet(hf):
    teacher, (x, _) = vit(hf), images(side=32)
    inputs = teacher(x).last_hidden_state  # checks what the map below must be
    distiller = Distiller(
        ResNet(),
        teacher,
        {
            "map": Term(HintLoss(16, 16), at=("layer3", "layernorm"), teacher=adapt.TokensToMap(prefix=1)),
            "at": Term(ATLoss(), at=("layer4", lambda out: out.last_hidden_state), teacher=adapt.TokensToMap(1)),
        },
        task_loss=None,
    )
    distiller.student.layer3[0].conv1.stride = (4, 4)
    distiller.student.layer3[0].downsample[0].stride = (4, 4)
    out = step(distiller, x)
    maps = adapt.TokensToMap(1)(out.teacher.last_hidden_state)
    assert maps.shape == (4, 16, 4, 4)
    torch.testing.assert_close(maps[:, :, 1, 2], inputs[:, 1 + 4 + 2])
    with pytest.raises(ValueError, match="after 0 tokens there must be a square of patches, got 17"):
        Distiller(
            ResNet(), teacher, Term(ATLoss(), at=("layer4", "layernorm"), teacher=adapt.TokensToMap()), task_loss=None
        )(x)


def test_vit_teaches_vit_of_other_tokens(hf):
    student = seeded(
        lambda: hf.DeiTModel(
            hf.DeiTConfig(
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                image_size=32,
                patch_size=8,
            ),
            add_pooling_layer=False,
        )
    )
    patches = Term(HintLoss(8, 16), at=("layernorm", "layernorm"), student=adapt.Tokens(2), teacher=adapt.Tokens(1))
    out = step(Distiller(student, vit(hf), patches, task_loss=None), images(side=32)[0])
    assert out.student.last_hidden_state.shape == (4, 18, 8)


def test_swin_teaches_resnet(hf):
    config = hf.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    teacher, (x, _) = seeded(lambda: hf.SwinModel(config), seed=1), images(side=32)
    distiller = Distiller(
        ResNet(),
        teacher,
        {
            "norm": Term(ATLoss(), at=("layer3", "layernorm"), teacher=adapt.TokensToMap()),
            "stage": Term(
                HintLoss(16, 16),
                at=("layer3", "encoder.layers.1"),
                teacher=nn.Sequential(adapt.Select(0), adapt.TokensToMap()),
            ),
        },
        task_loss=None,
    )
    step(distiller, x)
    bare = Distiller(ResNet(), teacher, Term(ATLoss(), at=("layer3", "encoder.layers.1")), task_loss=None)
    with pytest.raises((TypeError, ValueError), match="tensor"):
        bare(x)


def ids(*shape, seed=0):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def llama(hf, width, layers, *, seed=0):
    config = hf.LlamaConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        attn_implementation="eager",
        use_cache=False,
    )
    return seeded(lambda: hf.LlamaForCausalLM(config), seed=seed)


def test_llama_teaches_llama_hidden_states_attention_and_logits(hf):
    tokens = ids(2, 6)
    distiller = Distiller(
        llama(hf, 8, 1),
        llama(hf, 16, 2, seed=1),
        {
            "logits": KLLoss(),
            "hidden": Term(HintLoss(8, 16), at=("model.layers.0", "model.layers.1"), student=first, teacher=first),
            "norm": Term(HintLoss(8, 16), at=lambda out: out.hidden_states[-1]),
            "attention": Term(HintLoss(2, 2), at=(lambda out: out.attentions[0], lambda out: out.attentions[1])),
            "tapped": Term(
                HintLoss(2, 2),
                at=("model.layers.0.self_attn", "model.layers.1.self_attn"),
                student=adapt.Select(1),
                teacher=adapt.Select(1),
            ),
        },
        task_loss=None,
    )
    distiller.losses["tapped"].load_state_dict(distiller.losses["attention"].state_dict())
    out = step(distiller, {"input_ids": tokens, "output_hidden_states": True, "output_attentions": True})
    torch.testing.assert_close(out.terms["tapped"], out.terms["attention"])
    hidden = out.teacher.hidden_states[2]
    assert hidden.shape == (2, 6, 16)


def test_the_recipe_for_attention_maps_has_a_gradient_where_later_tokens_are_masked(hf):
    page = (Path(__file__).parents[2] / "docs/distiller.md").read_text(encoding="utf-8")
    names = {"torch": torch}
    exec(re.search(r"^def logarithms.*?\n\n", page, re.MULTILINE | re.DOTALL)[0], names)
    models, logarithms = (llama(hf, 8, 1), llama(hf, 8, 1, seed=1)), names["logarithms"]
    for model in models:  # far from each other
        model.model.layers[0].self_attn.q_proj.weight.data.mul_(300)
    term = Term(KLLoss(temperature=1.0), at=lambda out: out.attentions[0][:, 0], student=logarithms, teacher=logarithms)
    out = step(Distiller(*models, term, task_loss=None), {"input_ids": ids(2, 6), "output_attentions": True})
    ours, theirs = (side.attentions[0][:, 0].detach().double() for side in (out.student, out.teacher))
    assert (ours == 0).any()
    expected = torch.where(theirs == 0, 0.0, theirs * (theirs.log() - ours.log())).sum(-1).mean()
    torch.testing.assert_close(out.loss.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert models[0].model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


def test_bert_teaches_bert(hf):
    def bert(width, layers, seed):
        config = hf.BertConfig(
            vocab_size=50,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * width,
            attn_implementation="eager",
        )
        return seeded(lambda: hf.BertModel(config, add_pooling_layer=False), seed=seed)

    student, teacher = bert(8, 1, 0), bert(16, 2, 1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    inputs = {"input_ids": ids(2, 6), "attention_mask": mask, "output_attentions": True}
    terms = {
        "hidden": Term(HintLoss(8, 16), at=("encoder.layer.0", "encoder.layer.1"), student=first, teacher=first),
        "attention": Term(
            HintLoss(2, 2), at=adapt.Select("attentions"), student=adapt.Select(0), teacher=adapt.Select(1)
        ),
    }
    step(Distiller(student, teacher, terms, task_loss=None), inputs)
    del inputs["output_attentions"]
    with pytest.raises(ValueError, match=r"entry 'attentions' that is not None, got a .*output_hidden_states=True"):
        Distiller(student, teacher, terms["attention"], task_loss=None)(inputs)


def test_gpt2_teaches_gpt2_with_its_own_loss_as_the_task(hf):
    def gpt2(width, layers, seed):
        config = hf.GPT2Config(vocab_size=50, n_embd=width, n_layer=layers, n_head=2, n_positions=16, use_cache=False)
        return seeded(lambda: hf.GPT2LMHeadModel(config), seed=seed)

    tokens = ids(2, 6)
    at = ("transformer.h.0", "transformer.h.1")
    terms = {"logits": KLLoss(), "block": Term(HintLoss(8, 16), at=at, student=first, teacher=first)}
    distiller = Distiller(gpt2(8, 1, 0), gpt2(16, 2, 1), terms, task_loss=None)
    student_loss = distiller.student.eval()(input_ids=tokens, labels=tokens).loss
    out = step(distiller, {"input_ids": tokens, "labels": tokens})
    torch.testing.assert_close(out.student.loss, student_loss)


def test_t5_teaches_t5_encoder_and_decoder(hf):
    def t5(width, seed):
        config = hf.T5Config(
            vocab_size=50,
            d_model=width,
            d_kv=4,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            use_cache=False,
        )
        return seeded(lambda: hf.T5ForConditionalGeneration(config), seed=seed)

    terms = {
        "logits": LogitLoss(),
        "encoder": Term(HintLoss(8, 16), at="encoder.final_layer_norm"),
        "block": Term(HintLoss(8, 16), at="decoder.block.0", student=adapt.Select(0), teacher=adapt.Select(0)),
        "memory": Term(HintLoss(8, 16), at=lambda out: out.encoder_last_hidden_state),
        "dropout": Term(HintLoss(8, 16), at="decoder.dropout#1"),
    }
    distiller = Distiller(t5(8, 0), t5(16, 1), terms, task_loss=None)
    out = step(distiller, {"input_ids": ids(2, 6), "labels": ids(2, 4, seed=1)})
    assert out.student.logits.shape == (2, 4, 50)
