"""The encoder against transformers' on the same weights, and its public contract."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.device import DEVICE
from tests.helpers.ranks import run_ranks
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import (
    PreTrainingHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
    build_head,
)
from tpcore.models.packing import pack_sequences
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.sharding import shard

SINGLE = TensorParallelGroup.single()
TINY = BertConfig(
    vocab_size=97,
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    max_position_embeddings=24,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
IDS = torch.randint(1, 97, (3, 11), generator=torch.Generator(DEVICE).manual_seed(5))
MASK = (torch.arange(11) < torch.tensor([[11], [4], [8]])).long()  # 23 tokens
BATCH = {"input_ids": IDS * MASK, "attention_mask": MASK}


def _model(config=TINY, head=None, tp=SINGLE, **head_kwargs):
    torch.manual_seed(3)
    built = None if head is None else build_head(head, config, tp=tp, **head_kwargs)
    return BertModel(config, tp=tp, head=built)


def test_output_has_what_the_contract_says():
    out = _model().eval()(**BATCH)
    assert out.last_hidden_state.shape == (3, 11, 32)
    assert out.pooler_output.shape == (3, 32)
    assert torch.all(out.last_hidden_state[MASK == 0] == 0)
    assert torch.all(out.last_hidden_state[MASK == 1] != 0)
    assert out.loss is out.logits is out.start_logits is out.prediction_logits is None


def test_padding_changes_nothing():
    model = _model().eval()
    whole = model(**BATCH).last_hidden_state
    for i, length in enumerate(MASK.sum(1).tolist()):
        alone = model(IDS[i : i + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(whole[i, :length], alone, rtol=0, atol=2e-6)


def test_packed_entry_gives_the_same_tokens():
    model = _model().eval()
    lists = [IDS[i, :n].tolist() for i, n in enumerate(MASK.sum(1).tolist())]
    packed = model.forward_packed(pack_sequences(lists)).last_hidden_state
    whole = model(**BATCH).last_hidden_state[MASK == 1]
    torch.testing.assert_close(packed, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("checkpointing", [None, "full"])
@pytest.mark.parametrize("post_layernorm", [False, True])
def test_classification_without_hidden_states_is_the_same(post_layernorm, checkpointing):
    config = TINY.replace(hidden_dropout=0.3, attention_dropout=0.3, post_layernorm=post_layernorm)
    torch.manual_seed(3)
    head = build_head("sequence_classification", config, tp=SINGLE, num_labels=3)
    model = BertModel(config, head=head, activation_checkpointing=checkpointing).train()
    packed = pack_sequences([IDS[i, :n].tolist() for i, n in enumerate(MASK.sum(1).tolist())])
    labels = torch.tensor([0, 2, 1])
    outputs, gradients = [], []
    for hidden_states in (True, False):
        model.zero_grad()
        outputs.append(model.forward_packed(packed, labels, 7, hidden_states=hidden_states))
        outputs[-1].loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    whole, few = outputs
    assert whole.last_hidden_state.shape == (23, 32)
    assert few.last_hidden_state.shape == (3, 32)
    close = {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(
        few.last_hidden_state, whole.last_hidden_state[packed.first_tokens], **close
    )
    torch.testing.assert_close(few.logits, whole.logits, **close)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, **close)


def test_a_head_that_reads_all_tokens_gets_them():
    model = _model(TINY, "token_classification", num_labels=3).eval()
    packed = pack_sequences([IDS[0].tolist()])
    output = model.forward_packed(packed, hidden_states=False)
    assert output.logits.shape == (11, 3)


def test_dropout_follows_the_seed_and_the_sample_names():
    config = TINY.replace(hidden_dropout=0.3, attention_dropout=0.3)
    model = _model(config, "sequence_classification", num_labels=3).train()
    samples = torch.tensor([100, 5, 77])

    def logits(seed, order=(0, 1, 2)):
        index = list(order)
        batch = {name: tensor[index] for name, tensor in BATCH.items()}
        return model(**batch, sample_ids=samples[index], seed=seed).logits

    base = logits(1)
    assert torch.equal(base, logits(1))
    assert not torch.allclose(base, logits(2), atol=1e-3)
    torch.testing.assert_close(base[[2, 0, 1]], logits(1, (2, 0, 1)), rtol=0, atol=2e-6)
    torch.manual_seed(9)
    drawn = logits(None)
    torch.manual_seed(9)
    assert torch.equal(drawn, logits(None))


@pytest.mark.parametrize("post_layernorm", [False, True])
def test_every_parameter_gets_a_gradient(post_layernorm):
    config = TINY.replace(
        post_layernorm=post_layernorm,
        embedding_dropout_after_norm=post_layernorm,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )
    model = _model(config, "pretraining").train()
    labels = torch.where(MASK == 1, IDS, -100)
    model(**BATCH, labels=(labels, torch.tensor([0, 1, 1])), seed=4).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_errors_of_the_model():
    model = _model()
    with pytest.raises(ValueError, match="25 tokens exceeds max_position_embeddings=24"):
        model(torch.ones(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="this model has no head"):
        model(**BATCH, labels=torch.zeros(3, dtype=torch.long))
    no_pooler = _model(TINY.replace(add_pooler=False), "sequence_classification", num_labels=2)
    with pytest.raises(ValueError, match="needs a pooler"):
        no_pooler(**BATCH)
    with pytest.raises(ValueError, match="head='classifier' is unknown"):
        build_head("classifier", TINY, tp=SINGLE)
    with pytest.raises(ValueError, match=r"labels has shape \[3, 2\]"):
        _model(head="token_classification", num_labels=2)(
            **BATCH, labels=torch.zeros(3, 2, dtype=torch.long)
        )
    with pytest.raises(ValueError, match="a regression has 1"):
        SequenceClassificationHead(TINY, 2, tp=SINGLE, regression=True)


# --- heads -------------------------------------------------------------------------------------


def test_pretraining_loss_is_the_mean_over_labelled_tokens():
    model = _model(head="pretraining").eval()
    assert isinstance(model.head, PreTrainingHead)
    labels = torch.full_like(IDS, -100)
    labels[0, 2], labels[1, 1], labels[2, 7] = 5, 96, 13
    sentence = torch.tensor([1, 0, 1])
    out = model(**BATCH, labels=(labels, sentence))
    assert out.prediction_logits.shape == (3, 11, 128)  # padded vocabulary
    real = out.prediction_logits[..., :97]
    expected = torch.nn.functional.cross_entropy(real.reshape(-1, 97), labels.reshape(-1))
    expected += torch.nn.functional.cross_entropy(out.seq_relationship_logits, sentence)
    torch.testing.assert_close(out.loss, expected)


def test_token_classification_loss_ignores_unlabelled_tokens():
    model = _model(head="token_classification", num_labels=5).eval()
    assert isinstance(model.head, TokenClassificationHead)
    labels = torch.where(MASK == 1, IDS % 5, -100)
    labels[0, 0] = -100
    out = model(**BATCH, labels=labels)
    assert out.logits.shape == (3, 11, 5)
    expected = torch.nn.functional.cross_entropy(out.logits.reshape(-1, 5), labels.reshape(-1))
    torch.testing.assert_close(out.loss, expected)


def test_question_answering_scores_only_the_sequence_itself():
    model = _model(head="question_answering").eval()
    assert isinstance(model.head, QuestionAnsweringHead)
    spans = torch.tensor([[2, 5], [1, 3], [0, 0]])
    out = model(**BATCH, labels=spans)
    assert torch.all(torch.isneginf(out.start_logits[MASK == 0]))
    assert torch.isfinite(out.start_logits[MASK == 1]).all()
    expected = torch.stack(
        [
            torch.nn.functional.cross_entropy(logits[i, : MASK[i].sum()], spans[i, column])
            for column, logits in enumerate((out.start_logits, out.end_logits))
            for i in range(3)
        ]
    ).mean()
    torch.testing.assert_close(out.loss, expected)
    with pytest.raises(ValueError, match=r"expected \[batch, 2\]"):
        model(**BATCH, labels=torch.zeros(3, dtype=torch.long))


def test_regression_loss_is_the_mean_squared_error():
    model = _model(head="sequence_classification", num_labels=1, regression=True).eval()
    labels = torch.tensor([0.5, -1.0, 2.0])
    out = model(**BATCH, labels=labels)
    torch.testing.assert_close(out.loss, ((out.logits[:, 0] - labels) ** 2).mean())


# --- tensor parallelism ------------------------------------------------------------------------


def _check_shards_equal_the_whole_model(tp, post_layernorm):
    config = TINY.replace(
        vocab_size=250,  # padded to 256 at size 1, 256 at 2, 512 at 4
        hidden_dropout=0.2,
        attention_dropout=0.2,
        post_layernorm=post_layernorm,
        embedding_dropout_after_norm=post_layernorm,
    )
    labels = (torch.where(MASK == 1, IDS, -100), torch.tensor([0, 1, 0]))

    def run(group, padded):
        model = _model(config.replace(padded_vocab_size=padded), "pretraining", group).train()
        out = model(**BATCH, labels=labels, seed=12)
        out.loss.backward()
        return model, out

    whole, expected = run(SINGLE, 512)
    model, out = run(tp, None if tp.size == 4 else 512)
    torch.testing.assert_close(out.loss, expected.loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state, rtol=0, atol=5e-6)
    table = model.sharding_table()
    full = dict(whole.named_parameters())
    assert table.keys() == full.keys()
    for name, parameter in model.named_parameters():
        for what, ours, theirs in (
            ("weight", parameter, full[name]),
            ("grad", parameter.grad, full[name].grad),
        ):
            part = shard(theirs.detach(), table[name], tp.rank, tp.size)
            if what == "weight":
                assert torch.equal(ours, part), name
            else:
                scale = theirs.abs().max()
                assert (ours - part).abs().max() <= 2e-5 * scale + 1e-7, name


@pytest.mark.parametrize("post_layernorm", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_equal_the_whole_model(size, post_layernorm):
    run_ranks(_check_shards_equal_the_whole_model, size, post_layernorm)
