"""Train the adder: a small decoder-only model that answers ``348+1275=`` with ``3261|1623``.

The completion is the sum written twice: first from its least significant digit, the order in
which carries can be resolved one digit at a time, then after ``|`` the way people read it. Every
answer can therefore be checked with integer arithmetic, and the first half against the second.

Problems are drawn afresh at every step. One unordered pair of operands in fifty, picked by a
checksum, is never trained on, and only such pairs are used to measure the model.

    python -m models.adder.train --out DIR [--steps N] [--seed N] [--eval N]
"""

import argparse
import json
import math
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

MAX_DIGITS = 5
HOLD_OUT_ONE_IN = 50
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
ALPHABET = SPECIALS + list("0123456789+=|")
ID = {token: index for index, token in enumerate(ALPHABET)}
VOCAB_SIZE = 24  # the alphabet rounded up to a multiple of eight
IGNORED = -100

CHAT_TEMPLATE = (
    "{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- set question = users[-1].content | trim -%}"
    "{{- question if question.endswith('=') else question + '=' -}}"
)

Problem = tuple[int, int]
Batch = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    model = new_model()
    started = time.perf_counter()
    train(model, arguments.steps, arguments.batch, arguments.rate, arguments.seed)
    seconds = time.perf_counter() - started
    exact = exact_match(model, held_out_problems(arguments.eval))
    print(f"trained {arguments.steps} steps in {seconds:.0f} s, seed {arguments.seed}", flush=True)
    print(f"held-out exact match {exact:.2%} of {arguments.eval}", flush=True)
    save(model, arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the adder and write a Hugging Face folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=64, help="problems per step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="fixes the weights and the problems")
    parser.add_argument("--eval", type=int, default=2000, help="held-out problems to measure on")
    return parser.parse_args()


def new_model() -> Qwen3ForCausalLM:
    """Return an untrained model of eight layers and about one and a half million weights."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            initializer_range=0.06,
            tie_word_embeddings=False,
            pad_token_id=ID["<pad>"],
            bos_token_id=ID["<bos>"],
            eos_token_id=ID["<eos>"],
        )
    )


def train(model: Qwen3ForCausalLM, steps: int, batch: int, rate: float, seed: int) -> None:
    """Fit the model to problems that are not held out, reporting loss and held-out exact match."""
    draw = random.Random(seed)
    probe = held_out_problems(500)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_cosine(steps))
    started = time.perf_counter()
    running = 0.0
    model.train()
    for step in range(1, steps + 1):
        digits = digits_allowed(step, steps)
        ids, labels = encode([draw_problem(draw, digits, False) for _ in range(batch)])
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running += loss.item()
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            exact = exact_match(model, probe)
            print(f"step {step}  loss {running / 100:.4f}  held-out exact {exact:.2%}  {seconds:.0f} s", flush=True)
            running = 0.0


def warmup_then_cosine(steps: int) -> Callable[[int], float]:
    """Return the learning-rate multiplier: up over the first 5 %, then down to 2 % by a cosine."""
    warmup = max(1, steps // 20)

    def multiplier(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.02 + 0.49 * (1.0 + math.cos(math.pi * progress))

    return multiplier


def digits_allowed(step: int, steps: int) -> int:
    """Return the longest operand to train on: two digits first, all from 15 % of the steps on."""
    return min(MAX_DIGITS, 2 + 20 * step // steps)


def draw_problem(draw: random.Random, max_digits: int, held_out: bool) -> Problem:
    """Return two operands on the asked side of the hold-out, digit counts uniform."""
    while True:
        problem = draw_operand(draw, max_digits), draw_operand(draw, max_digits)
        if is_held_out(problem) == held_out:
            return problem


def draw_operand(draw: random.Random, max_digits: int) -> int:
    digits = draw.randint(1, max_digits)
    return draw.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def is_held_out(problem: Problem) -> bool:
    """Say whether training must never see this sum, whichever operand comes first."""
    low, high = sorted(problem)
    return zlib.crc32(f"{low}+{high}".encode()) % HOLD_OUT_ONE_IN == 0


def held_out_problems(count: int) -> list[Problem]:
    """Return the same distinct held-out problems at every call."""
    draw = random.Random("held out")
    problems: dict[Problem, None] = {}
    while len(problems) < count:
        problems[draw_problem(draw, MAX_DIGITS, True)] = None
    return list(problems)


def prompt_of(problem: Problem) -> str:
    return f"{problem[0]}+{problem[1]}="


def completion_of(problem: Problem) -> str:
    total = str(sum(problem))
    return f"{total[::-1]}|{total}"


def encode(problems: list[Problem]) -> Batch:
    """Return token ids padded at the end, and labels that count the completions alone."""
    rows, targets = [], []
    for problem in problems:
        prompt = [ID["<bos>"], *(ID[character] for character in prompt_of(problem))]
        completion = [*(ID[character] for character in completion_of(problem)), ID["<eos>"]]
        rows.append(prompt + completion)
        targets.append([IGNORED] * len(prompt) + completion)
    width = max(map(len, rows))
    ids = [row + [ID["<pad>"]] * (width - len(row)) for row in rows]
    labels = [target + [IGNORED] * (width - len(target)) for target in targets]
    return torch.tensor(ids), torch.tensor(labels)


def exact_match(model: Qwen3ForCausalLM, problems: list[Problem]) -> float:
    """Return the share of problems whose whole completion greedy decoding gets right.

    One pass over the true completions decides this exactly: greedy decoding writes the true
    completion if and only if every one of its tokens is the likeliest after the true ones before.
    """
    model.eval()
    right = 0
    for start in range(0, len(problems), 500):
        ids, labels = encode(problems[start : start + 500])
        with torch.no_grad():
            guesses = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        right += int(((guesses == labels[:, 1:]) | (labels[:, 1:] == IGNORED)).all(-1).sum())
    model.train()
    return right / len(problems)


def save(model: Qwen3ForCausalLM, out: Path) -> None:
    """Write weights, tokenizer, chat template and greedy generation settings to one folder."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=2 * MAX_DIGITS + 4,
        pad_token_id=ID["<pad>"],
        bos_token_id=ID["<bos>"],
        eos_token_id=ID["<eos>"],
    )
    model.save_pretrained(out)
    tokenizer = new_tokenizer()
    tokenizer.save_pretrained(out, save_jinja_files=False)
    specials = json.dumps(tokenizer.special_tokens_map, indent=2)
    (out / "special_tokens_map.json").write_text(specials + "\n", encoding="utf-8")


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer giving one id per character after ``<bos>``, and joining them back."""
    tokenizer = Tokenizer(models.BPE(vocab=ID, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ID["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )


if __name__ == "__main__":
    main()
