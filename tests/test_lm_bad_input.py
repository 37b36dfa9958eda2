"""What a user can get wrong, through the command line: exit code, one line on stderr that names the
file or the argument, no traceback, and nothing written where nothing should be."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastlm.lm import checkpoint, cli, data, errors, files, machine
from fastlm.lm.tokenizer import BPETokenizer, ByteTokenizer

TINY = "--tokenizer bytes --hidden 16 --batch 4 --seq 16 --evals 1 --eval-tokens 100 --quiet"
LOUD = TINY.replace("--quiet", "--log-every 0")
RL = "rl {w}/run --reward {w}/judge --batch 4 --group 2 --prompt 4 --length 4"
DPO = "dpo --model {w}/run --preferences {w}/two.jsonl --batch 1 --data {w}/good.txt"
PAIR = {"prompt": "see ", "chosen": "cat", "rejected": "dog"}


def bad_texts(folder: Path) -> None:
    text = data.load().documents[0].text[5000:20000]
    content = {
        "good.txt": text.encode(),
        "latin.txt": "\u00e9t\u00e9 ".encode("latin-1") * 200,
        "nul.txt": b"ab\0\0" * 200,
        "few_nul.txt": text.encode() + b"\0",
        "crlf.txt": text.replace("\n", "\r\n").encode(),
        "empty.txt": b"",
        "blank.txt": b" \r\n\t\n" * 50,
        "control.txt": b"\x01\x02\x03" * 50,
        "cut.txt.gz": gzip.compress(text.encode())[:-500],
        "column.jsonl": b'{"body": "x"}\n',
        "column.csv": b"body,id\nx,1\n",
        "broken.jsonl": b"{\n[1]\n",
        "number.jsonl": b'{"text": 5}\n',
        "no_origin.jsonl": json.dumps(PAIR).encode(),
        "na\udcffme.txt": text.replace("\n", "\r\n").encode(),  # bytes that are no text
        "half.jsonl": b'{"text": "some text, \\ud83d\\ude00 and \\udc00"}\n',
        "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"\n",
        "questions.jsonl": b'{"prompt": "", "a": "x", "b": "y"}\n',
        "two.jsonl": "".join(
            json.dumps({**PAIR, "prompt": p, "provenance": "human:me"}) + "\n" for p in "xyz"
        ).encode(),
        "prefs.jsonl": json.dumps({**PAIR, "provenance": "human:me"}).encode(),
    }
    for name, raw in content.items():
        (folder / name).write_bytes(raw)
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "clean").mkdir()
    (folder / "clean" / "report.json").write_text('{"read": 1, "kept": 1}')


def flip(model: Path) -> None:
    raw = bytearray((model / checkpoint.MODEL).read_bytes())
    raw[len(raw) // 2] ^= 4
    (model / checkpoint.MODEL).write_bytes(raw)


def cut(model: Path) -> None:
    os.truncate(model / checkpoint.MODEL, 1000)


def other_tokenizer(model: Path, *, honest: bool = True) -> None:
    """Another tokenizer in the folder; `honest`: with a manifest that agrees."""
    BPETokenizer.train(["a text"], 257).save(model / checkpoint.TOKENIZER)
    if honest:
        sign(model)


def smaller_tokenizer(model: Path) -> None:
    BPETokenizer.train(["a text of other words than those"] * 9, 270).save(
        model / checkpoint.TOKENIZER
    )
    sign(model)


def no_tokenizer(model: Path) -> None:
    (model / checkpoint.TOKENIZER).write_text("{}")
    sign(model)


def sign(model: Path) -> None:
    (model / files.MANIFEST).unlink()
    names = [p.name for p in model.iterdir()]
    entries = {
        n: {"bytes": (model / n).stat().st_size, "sha256": files.sha256(model / n)} for n in names
    }
    files.write_json(model / files.MANIFEST, {"files": entries})


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (flip, r"flipped/model.safetensors: content differs from its sha256"),
    "cut": (cut, r"cut/model.safetensors: truncated, 1000 of \d+ bytes"),
    "unsigned": (lambda m: (m / files.MANIFEST).unlink(), "unsigned/manifest.json: missing"),
    "lost": (lambda m: (m / checkpoint.MODEL).unlink(), "lost/model.safetensors: missing"),
    "stateless": (lambda m: (m / checkpoint.STATE).unlink(), "stateless/state.json: missing"),
    "swapped": (
        lambda m: other_tokenizer(m, honest=False),
        r"swapped/tokenizer.json: .*manifest",
    ),
    "mismatched": (other_tokenizer, "mismatched/tokenizer.json: not the tokenizer of the model's"),
    "narrow": (smaller_tokenizer, r"narrow/tokenizer.json: 2\d\d ids, the model has 257"),
    "mute": (no_tokenizer, "mute/tokenizer.json: not a tokenizer"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Texts of every badness, a run, a reward model, and copies of the model damaged each way."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(machine, "gemm_rate", lambda **_: 1e9)
        bad_texts(folder)
        assert (
            code_of(f"train --data {folder}/good.txt --out {folder}/run --budget 2steps {TINY}")
            == 0
        )
        given = f"--model {folder}/run --out {folder}/judge --budget 1steps --batch 2 --quiet"
        assert code_of(f"reward {folder}/prefs.jsonl {given}") == 0
        for name, (damage, _) in DAMAGES.items():
            shutil.copytree(folder / "run" / "model", folder / name)
            damage(folder / name)
        yield folder


def code_of(command: str) -> int:
    try:
        return cli.main(shlex.split(command))
    except SystemExit as stop:  # of argparse
        assert isinstance(stop.code, int)
        return stop.code


@dataclass(frozen=True)
class Case:
    command: str  # {w} is the world, {out} a path where nothing is
    code: int
    says: str  # a regular expression

    def __str__(self) -> str:
        return re.sub(r"[^\w-]+", "_", self.command.replace("{w}/", "").replace("{out}", ""))


TEXT_COMMANDS = (
    "train --out {out} --budget 1steps --quiet --data",
    "data stats",
    "data clean --out {out}",
    "data tokenize --out {out} --tokenizer bytes",
    "eval {w}/run",
    "summarize {w}/run",
)
BAD_TEXTS = {
    "none.txt": "no such file",
    "latin.txt": r"not text, [\d,]+ of [\d,]+ bytes are bytes that are not UTF-8",
    "nul.txt": r"not text, 400 of 800 bytes are NUL bytes",
    "empty.txt": "empty",
    "blank.txt": "empty",
    "cut.txt.gz": "damaged gzip file",
    "folder": "no file in this folder|a folder, one text is expected",
    "run/model": "no file in this folder|a folder, one text is expected",
}
USES_OF_A_MODEL = (
    "generate {model}",
    "eval {model} {w}/good.txt",
    "summarize {model} {w}/good.txt",
    "prefs from-model {model} --out {out} --count 1",
    "reward {w}/prefs.jsonl --model {model} --out {out} --budget 1steps",
    "rl {model} --reward builtins:zip --out {out} --budget 1steps",
)


def cases() -> Iterator[Case]:
    for name, says in BAD_TEXTS.items():
        for command in TEXT_COMMANDS:
            yield Case(f"{command} {{w}}/{name}", errors.BAD_INPUT, f"{name}: ({says})")
    for command in TEXT_COMMANDS[:4]:
        yield Case(f"{command} {{w}}/control.txt", errors.BAD_INPUT, "no usable text .*control")
        for name in ("column.jsonl", "column.csv"):
            says = rf"{name}: line \d has no column 'text'; there are 'body'.*--column"
            yield Case(f"{command} {{w}}/{name}", errors.BAD_INPUT, says)
        for name in ("broken.jsonl", "number.jsonl"):
            says = f"{name}: no usable record .*line 1"
            yield Case(f"{command} {{w}}/{name}", errors.BAD_INPUT, says)
    for name, (_, says) in DAMAGES.items():
        for use in USES_OF_A_MODEL:
            command = use.replace("{model}", f"{{w}}/{name}")
            yield Case(command, errors.BAD_CHECKPOINT, says)
    for name, says in {"good.txt": "a file, not a folder", "none": "no such folder"}.items():
        for use in USES_OF_A_MODEL:
            command = use.replace("{model}", f"{{w}}/{name}")
            yield Case(command, errors.BAD_CHECKPOINT, f"{name}: {says}")
    yield from OTHERS


USE, BAD, SAVED = errors.USAGE, errors.BAD_INPUT, errors.BAD_CHECKPOINT
REWARD = "reward {w}/prefs.jsonl --model {w}/run --budget 1steps"
OTHERS = [
    # a file that is not what the command reads
    Case("prefs check {w}/none", BAD, "none: no such file"),
    Case("prefs check {w}/run", BAD, "run: cannot be read"),
    Case("prefs check {w}/latin.txt", BAD, "latin.txt: not text, 400 of 800 bytes"),
    Case("prefs check {w}/good.txt", BAD, r"good.txt: line 1: .*\(lines that are not JSON\)"),
    Case("prefs check {w}/empty.txt", BAD, "empty.txt: empty, no text in it"),
    Case("prefs check {w}/no_origin.jsonl", BAD, "no_origin.jsonl: line 1: no provenance"),
    Case("prefs check {w}/column.jsonl --provenance dataset:x", BAD, "line 1: no text in"),
    Case("prefs label {w}/none --out {out}", BAD, "none: "),
    Case("prefs label {w}/run --out {out}", BAD, "run: "),
    Case("data stats {w}/good.txt --stop-words {w}/none", BAD, "none: no list of stop words"),
    Case("summarize {w}/run {w}/good.txt --reference {w}/run", BAD, "run: cannot be read"),
    Case("train --data {w}/good.txt --holdout x --out {out}", BAD, "no document named 'x'"),
    Case("train --data {w}/good.txt --holdout 2 --out {out}", BAD, "between 0 and 1, got 2"),
    Case("cv --data {w}/good.txt --budget 1steps", BAD, "at least 2 documents"),
    Case("generate {w}/judge", SAVED, "judge/state.json: no model in it"),
    Case("rl {w}/run --reward {w}/run/model --out {out}", SAVED, "run/model: no reward model"),
    Case("rl {w}/run --reward {w}/judge --judge {w}/none --out {out}", SAVED, "none"),
    Case("train --data {w}/good.txt --out {out} --resume {w}/none", SAVED, "none: no such folder"),
    # an --out that cannot be
    Case("train --data {w}/good.txt --out {w}/good.txt", USE, "good.txt"),
    Case("data clean {w}/good.txt --out {w}/run", USE, "run: is there already"),
    Case("data card {w}/good.txt --out {w}/folder", USE, "folder: Is a directory"),
    Case("prefs check {w}/prefs.jsonl --out {w}/folder", USE, "folder: Is a directory"),
    Case("prefs from-model {w}/run --count 1 --out {w}/folder", USE, "folder: Is a directory"),
    Case(f"{REWARD} --out {{w}}/good.txt", USE, "good.txt: is there already and no checkpoint"),
    Case(f"{REWARD} --out {{w}}", USE, ": is there already and no checkpoint"),
    # names that do not exist
    Case("", USE, "COMMAND"),
    Case("trian", USE, r"'trian' is none of .*; did you mean train\?"),
    Case("data tokenise", USE, r"'tokenise' is none of .*; did you mean tokenize\?"),
    Case("train --hiden 3", USE, r"fastlm train: .*option --hiden; did you mean --hidden\?"),
    Case("data stats --colunm=x", USE, r"option --colunm; did you mean --column\?"),
    Case("generate {w}/run --xyz", USE, r"unknown option --xyz \(see fastlm generate --help\)"),
    Case("doctor now", USE, "unexpected argument 'now'"),
    Case("train --model grru", USE, r"--model: 'grru' is none of .*; did you mean gru"),
    Case("train --hidden x", USE, "--hidden: invalid int value: 'x'"),
    Case("generate", USE, "required: model"),
    Case("train --budget soon", USE, "budget must be like 90s, .* got 'soon'"),
    Case("train --threads 0", USE, "--threads must be at least 1, got 0"),
    Case(
        "rl {w}/run --reward nowhere:f --out {out}",
        USE,
        "MODULE:FUNCTION or a folder with a reward model, 'nowhere:f'",
    ),
    Case("data stats {w}/good.txt --encoding latin-99", USE, "unknown encoding 'latin-99'"),
    Case("data stats {w}/good.txt --encoding zip", USE, "unknown encoding 'zip'"),
    Case("data stats {w}/good.txt --encoding utf-16", BAD, r"good.txt: not UTF-16 \(.*BOM"),
    Case("train --patience 0", USE, "patience must be at least 1, got 0"),
    Case("train --weight-decay nan", USE, "--weight-decay: must be a finite number, got nan"),
    Case("train --save-every nan", USE, "--save-every: must be a finite number, got nan"),
    Case("train --log-every inf", USE, "--log-every: must be a finite number, got inf"),
    Case("train --log-every -1", USE, "--log-every must not be negative, got -1"),
    Case(
        "train --data {w}/good.txt --save-every -1 --out {out}", USE, "save_every must not be neg"
    ),
    Case("rl {w}/run --reward {w}/judge --save-every -1 --out {out}", USE, "save_every must not"),
    Case("train --hidden 99999999999999999999", USE, "--hidden: must be at most 2,147,483,647"),
    Case("train --set model.hidden=99999999999", USE, "model.hidden must be at most 2,147,483,647"),
    Case("generate {w}/run --presence-penalty inf", USE, "--presence-penalty: must be a finite"),
    Case("generate {w}/run --seed 18446744073709551616", USE, r"--seed: must be in \[-2\*\*63"),
    Case("train --set train.lr=inf", USE, "train.lr must be a finite number, got inf"),
    Case("train --layers 1000000", USE, "layers must be at most 4,096, got 1,000,000"),
    Case("train --hidden 0", USE, "hidden must be at least 1, got 0"),
    Case("train --workers 1000 --data {w}/good.txt --out {out}", USE, "workers must be at most 64"),
    Case("train --threads 5000", USE, "--threads must be at most 1,024, got 5,000"),
    Case(
        "train --data {w}/good.txt --model transformer --z-loss -1 --out {out}",
        USE,
        "z_loss must be finite and not negative, got -1",
    ),
    Case("data stats {w}/good.txt --min-characters -1", USE, "min_characters must not be negative"),
    Case("bench recall --pairs 0", USE, "pairs must be at least 1, got 0"),
    Case("bench recall --threads 0", USE, "--threads must be at least 1, got 0"),
    Case("train --data {w}/good.txt --learn all", USE, "--learn is for --pairs, not for text"),
    Case("train --out {w}/run --model transformer", USE, "is of --model gru, not transformer"),
    Case("summarize {w}/run --sentences 0 {w}/good.txt", USE, "at least 1 sentence, got 0"),
    Case("eval {w}/run --samples 2 {w}/none.txt", BAD, "none.txt: no such file"),
    Case("report {w}/clean", BAD, "clean: not the report of a run"),
    Case("report {w}/judge", BAD, "judge: neither report.json nor metrics.jsonl"),
    # a name that cannot be one, a file that is not what it says
    Case("train --data ''", USE, "--data: a name of a file or folder is empty"),
    Case("data stats ''", BAD, "a name of a file or folder is empty"),
    Case("train --data {w}/loop", USE, "--data .*loop: Symlink loop|--data .*loop: .*symbolic"),
    Case("train --data {w}/na\udcffme.txt", USE, "a name that is not UTF-8; rename it"),
    Case("train --data -", USE, "standard input can be read once only"),
    Case("data stats {w}/deep.jsonl", BAD, "deep.jsonl: no usable record .*nested too deeply"),
    Case("prefs check {w}/deep.jsonl", BAD, "line 1: nested too deeply"),
    Case("generate {w}/run --prompts {w}/deep.jsonl", BAD, "line 1: no JSON: nested too deeply"),
    Case("prefs label {w}/questions.jsonl --out {w}/number.jsonl", BAD, "line 1 is no answer of"),
    Case("prefs label {w}/questions.jsonl --out {w}/latin.txt", BAD, "no answers of prefs label"),
    Case("prefs label {w}/questions.jsonl --out {w}/folder", USE, "folder: cannot be read"),
    Case("train --seed 99999999999999999999", USE, r"seed:? must be in \[-2"),
    Case("eval {w}/run --samples -1", USE, "--samples must not be negative, got -1"),
    Case("generate {w}/run --top-p 3", USE, r"top_p must be in \[0, 1\], got 3"),
    Case("prefs from-model {w}/run --out {out} --count 0", USE, "--count must be at least 1"),
    Case("rl {w}/run --reward {w}/judge --out {out} --lr nan", USE, "--lr: must be a finite"),
    Case("rl {w}/run --reward {w}/judge --out {out} --lr 0", USE, "lr and temp.*above 0"),
    Case(
        "train --out {w}/run --budget 3steps --allow-change budgte",
        USE,
        r"nothing is called 'budgte'; did you mean budget\?",
    ),
]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("\n") == 1 and re.match(r"fastlm[ a-z-]*: (error: )?", said), said
    return said


@pytest.fixture(autouse=True)
def _quick(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "cache"))
    monkeypatch.setattr(machine, "gemm_rate", lambda **_: 1e9)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_bad_input(
    case: Case, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert code_of(case.command.format(w=world, out=out)) == case.code
    said = one_line(capsys)
    assert re.search(case.says, said), said
    assert not out.exists() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, counted",
    [
        ("few_nul.txt", "control"),
        ("crlf.txt", "line endings"),
        ("na\udcffme.txt", "line endings"),
        ("half.jsonl", "halves"),
    ],
)
def test_what_can_be_cleaned_is_no_error(
    name: str, counted: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(f"data stats {world}/{name} --json") == errors.OK
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert sum(n for what, n in counts.items() if counted in what) > 0


@pytest.mark.parametrize(
    "command, code, made",
    [
        (f"train --data {{w}}/good.txt --out {{out}} --budget 99steps {LOUD}", 130, "checkpoints"),
        (f"{RL} --budget 99steps --out {{out}}", 130, "checkpoints"),
        (f"{DPO} --budget 99steps --out {{out}}", 130, "checkpoints"),
        ("reward {w}/prefs.jsonl --model {w}/run --out {out} --budget 1steps", 0, "manifest.json"),
        ("data tokenize {w}/good.txt --out {out} --tokenizer bytes", 0, "manifest.json"),
        ("prefs from-model {w}/run --count 2 --tokens 4 --out {out}", 0, ""),
        ("generate {w}/run --max-new-tokens 2", 0, None),
        ("doctor --json", 0, None),
        ("data stats {w}/good.txt", 0, None),
    ],
)
def test_nobody_reads_any_more(
    command: str,
    code: int,
    made: str | None,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, write = os.pipe()
    os.close(read)
    out = tmp_path / "out"
    with open(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert code_of(command.format(w=world, out=out)) == code
    said = capsys.readouterr().err
    if code == errors.INTERRUPTED:
        assert "interrupted and saved" in said and checkpoint.newest(out) is not None
    else:
        assert said == ""
    assert made is None or (out / made).exists()


def test_a_run_among_its_text_is_not_read(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(world / "good.txt", tmp_path / "good.txt")
    monkeypatch.chdir(tmp_path)
    command = f"train --data . --out runs/a {TINY} --budget"
    assert code_of(f"{command} 1steps") == errors.OK
    assert code_of(f"{command} 2steps --allow-change budget") == errors.OK
    assert code_of("data stats . --json") == errors.OK
    assert json.loads(capsys.readouterr().out)["kept"] == 1
    assert code_of("data stats runs/a") == errors.BAD_INPUT


def test_resume_with_another_tokenizer_is_refused(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"train --data {world}/good.txt --out {world}/run --tokenizer bpe --vocab 300 --quiet"
    assert code_of(command) == errors.USAGE
    assert re.search(r"data.tokenizer: \w+ -> \w+", one_line(capsys))


def test_a_text_that_has_changed_since_the_training(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    shutil.copyfile(world / "good.txt", text)
    options = f"{TINY} --tokenizer bpe --vocab 300 --budget 1steps"
    assert code_of(f"train --data {text} --out {run} {options}") == errors.OK
    text.write_text("quite other words, " * 500)
    remedies = {
        f"eval {run}": "name a text: fastlm eval .*run PATH",
        f"rl {run} --reward {world}/judge --out {tmp_path}/rl": "give --data and --holdout as in",
    }
    for command, remedy in remedies.items():
        assert code_of(command) == errors.BAD_INPUT
        said = one_line(capsys)
        assert re.search(f"tokenizer is not that of this text; .*{remedy}", said), said
        assert command.startswith("rl") or "--data" not in said


@pytest.mark.parametrize("limit", [10, 2000, 40_000])
@pytest.mark.parametrize(
    "command",
    [
        f"train --data {{w}}/good.txt --out {{out}} --budget 2steps {TINY}",
        "data clean {w}/good.txt --out {out} --quiet",
        "data tokenize {w}/good.txt --out {out} --tokenizer bytes --quiet",
        "reward {w}/prefs.jsonl --model {w}/run --out {out} --budget 1steps --batch 2 --quiet",
        "prefs from-model {w}/run --out {out} --count 200 --quiet",
    ],
)
def test_a_full_disk_is_5(
    command: str, limit: int, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = code_of(command.format(w=world, out=out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if code == errors.OK:
        assert limit == 40_000 and sum(p.stat().st_size for p in tmp_path.rglob("*")) > 0
        return
    assert code == errors.OUT_OF_SPACE
    said = one_line(capsys)
    assert re.search(rf"[\d,]+ bytes needed, [\d,]+ free, no file above {limit:,}", said), said
    assert not list(tmp_path.rglob(".*"))  # nothing half done


def test_out_of_memory_is_5(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"train --data {world}/good.txt --out {tmp_path}/out --budget 1steps {TINY}"
    assert code_of(f"{command} --hidden 1000000000") == errors.OUT_OF_SPACE
    assert "out of memory" in one_line(capsys)


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder of a user without any right elsewhere: for root, rights are no obstacle."""
    folder = Path(tempfile.mkdtemp(prefix="fastlm."))
    if os.getuid() == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(os.getuid())
        for path in folder.iterdir():
            path.chmod(0o700)
        shutil.rmtree(folder)


def test_folders_and_files_without_rights(
    world: Path, nobody: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(nobody / "cache"))
    (nobody / "text.txt").write_text("words and more words\n" * 100)
    (nobody / "secret.txt").write_text("x")
    (nobody / "secret.txt").chmod(0)
    for name in ("closed", "read_only"):
        checkpoint.write(nobody / name, {}, {}, {}, ByteTokenizer())
    (nobody / "closed").chmod(0)
    (nobody / "read_only").chmod(0o500)
    expected = {
        "data stats {n}/secret.txt": (errors.BAD_INPUT, "secret.txt: cannot be read"),
        "train --data {n}/secret.txt": (errors.BAD_INPUT, "secret.txt: cannot be read"),
        "prefs check {n}/secret.txt": (errors.BAD_INPUT, "secret.txt: cannot be read"),
        "generate {n}/closed": (errors.BAD_CHECKPOINT, "closed.*Permission denied"),
        "eval {n}/closed {n}/text.txt": (errors.BAD_CHECKPOINT, "closed.*Permission denied"),
        "data clean {n}/text.txt --out {n}/read_only/x": (errors.USAGE, "read_only.*Permission"),
        f"train --data {{n}}/text.txt --out {{n}}/read_only/x {TINY} --budget 1steps": (
            errors.USAGE,
            "read_only/x: Permission denied",
        ),
    }
    for command, (code, says) in expected.items():
        assert code_of(command.format(n=nobody)) == code, command
        said = one_line(capsys)
        assert re.search(says, said), said
