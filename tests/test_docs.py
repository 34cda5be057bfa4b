"""README.md and docs/ say what the code does: Python runs, commands parse, names exist."""

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import swinq
from swinq import config, config_files, defaults
from swinq.cli import main, resolve, unused
from swinq.errors import ConfigError
from swinq.flags import ABSENT, ACTIONS, FLAGS, parse
from swinq.models.architecture import Architecture
from swinq.models.build import build_model
from swinq.models.variants import VARIANTS
from swinq.quant.insert import resolve_precisions
from swinq.quant.spec import QuantSpec
from tests.test_architecture import ROOMS

REPO_ROOT = Path(__file__).resolve().parents[1]
CSRC = REPO_ROOT / "csrc"
PAGES = [REPO_ROOT / "README.md", REPO_ROOT / "CHANGELOG.md", *sorted(REPO_ROOT.glob("docs/*.md"))]
PAGES.append(CSRC / "NUMERICS.md")
DEFAULTS = dict(config.leaves(defaults.DEFAULTS))
IMAGENET = "/data/imagenet"  # what the pages call the user's data

# A Swin v1 small enough to be calibrated in a second, saved under the names that the pages use.
STAND_IN = Architecture(
    version=1,
    img_size=16,
    patch_size=2,
    in_chans=3,
    num_classes=3,
    embed_dim=32,
    depths=(2, 2),
    num_heads=(1, 2),
    window_size=4,
    mlp_ratio=2.0,
    qkv_bias=True,
    pretrained_window_sizes=(0, 0),
    norm_eps=1e-5,
)


def name_of(page: Path) -> str:
    """Path below the root, as a test id."""
    return page.relative_to(REPO_ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language: number of the first line, and text."""
    found, start, opened = [], 0, ""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if not start:
            start, opened = number, line[3:]
        else:
            if opened == language:
                found.append((start + 1, "\n".join(lines[start : number - 1])))
            start = 0
    assert not start, f"{name_of(page)}:{start}: a block is not closed"
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def code_spans(page: Path) -> set[str]:
    """Everything in backticks outside of blocks."""
    return set(re.findall(r"`([^`\n]+)`", prose(page)))


def table_rows(page: Path, first: str) -> list[list[str]]:
    """The cells of the table whose header begins with `first`, without backticks."""
    lines = iter(page.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith(f"| {first} |"):
            next(lines)
            rows = []
            for row in lines:
                if not row.startswith("|"):
                    return rows
                rows.append([cell.strip().replace("`", "") for cell in row.strip("|").split("|")])
            return rows
    raise AssertionError(f"{name_of(page)} has no table that begins with '{first}'")


def commands(page: Path) -> Iterator[tuple[int, dict[str, str], list[str]]]:
    """Line number, variables set before it, and words of each command in a page's bash blocks."""
    for first, block in blocks(page, "bash"):
        pending = ""
        for number, line in enumerate(block.splitlines(), first):
            if line.endswith("\\"):
                pending += line[:-1]
                continue
            words, pending = shlex.split(pending + line, comments=True), ""
            variables: dict[str, str] = {}
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                name, _, value = words.pop(0).partition("=")
                variables[name] = value
            if words:
                yield number, variables, words
        assert not pending, f"{name_of(page)}: the block from line {first} ends with a backslash"


def test_every_page_is_looked_at() -> None:
    assert len([page for page in PAGES if page.parent.name == "docs"]) >= 6
    assert all(page.read_text(encoding="utf-8").startswith("# ") for page in PAGES)


# --- Python ---


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a checkpoint and images under the names that the pages use."""
    torch.manual_seed(0)
    model = build_model(STAND_IN)
    torch.save({"model": model.state_dict()}, tmp_path / "swin_tiny_patch4_window7_224.pth")
    for split, count in (("train", 22), ("val", 4)):
        for label in range(STAND_IN.num_classes):
            folder = tmp_path / "imagenet" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                colours = torch.randint(256, (24, 24, 3), dtype=torch.uint8).numpy()
                Image.fromarray(colours).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_of_a_page_runs_in_order(page: Path, stand_ins: Path) -> None:
    namespace: dict[str, object] = {"__name__": "snippet"}
    for first, source in blocks(page, "python"):
        source = "\n" * (first - 1) + source.replace(IMAGENET, str(stand_ins / "imagenet"))
        exec(compile(source, str(page), "exec"), namespace)


def test_readme_and_api_page_have_python() -> None:
    assert blocks(REPO_ROOT / "README.md", "python")
    assert len(blocks(REPO_ROOT / "docs" / "python-api.md", "python")) >= 8


def test_api_page_has_each_function_with_its_signature() -> None:
    text = (REPO_ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^## `swinq\.(\w+)(\(.*\))`$", text, re.M))
    wanted = {}
    for name in set(swinq.__all__) - {"__version__"}:
        signature = inspect.signature(getattr(swinq, name))
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        wanted[name] = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    assert documented == wanted


# --- commands ---


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_are_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = (config_files.CONFIGS / "quant" / "int8.yaml").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for number, _, words in commands(page):
        where = f"{name_of(page)}:{number}: {shlex.join(words)}"
        if words[0] in ("torchrun", "python") and not words[1].startswith("scripts/"):
            assert words.count("swinq/main.py") == 1, where
            place = words.index("swinq/main.py")
            assert_launches(words[:place], where)
            argv = words[place + 1 :]
        elif words[0] == "swinq":
            argv = words[1:]
        else:
            continue
        args = parse(argv)
        if args.recipe and args.recipe not in config_files.shipped("recipe"):
            path = tmp_path / args.recipe
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(recipe)
        resolve(args)
        assert not unused(args), f"{where}: {unused(args)} changes nothing"


def assert_launches(words: list[str], where: str) -> None:
    """`torchrun`, with flags of its own and a value for each, or `python` alone."""
    flags = words[1::2]
    assert words[0] == "torchrun" or not flags, where
    assert len(words) % 2 == 1, where
    for flag in flags:
        with pytest.raises(ConfigError, match="is a flag of torchrun"):
            parse([flag])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_of_a_page_exist_and_know_what_they_are_given(page: Path) -> None:
    installer = (REPO_ROOT / "scripts" / "install.sh").read_text(encoding="utf-8")
    for number, variables, words in commands(page):
        where = f"{name_of(page)}:{number}: {shlex.join(words)}"
        scripts = [word for word in words if word.startswith("scripts/")]
        if not scripts:
            assert words[0] in ("torchrun", "python", "swinq", "tensorboard"), where
            continue
        path = REPO_ROOT / scripts[0]
        assert path.is_file(), where
        text = path.read_text(encoding="utf-8")
        for variable in variables:
            known = "environ" if path.suffix == ".py" else f"${{{variable}:-"
            assert known in text + installer, f"{where}: does not read {variable}"
        for word in words[words.index(scripts[0]) + 1 :]:
            if word.startswith("--"):
                own = f'"{word}"' in text if path.suffix == ".py" else word[2:] in FLAGS
                assert own, f"{where}: {word}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "console")], ids=name_of)
def test_shown_sessions_are_what_is_printed(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SWINQ_DEBUG", raising=False)
    for first, block in blocks(page, "console"):
        command, _, shown = block.partition("\n")
        words = shlex.split(command)
        assert words[:3] == ["$", "python", "swinq/main.py"], f"{name_of(page)}:{first}"
        assert main(words[3:]) == 2
        printed = capsys.readouterr()
        assert (printed.out + printed.err).strip() == shown, f"{name_of(page)}:{first}"


# --- names ---


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_in_backticks_exist(page: Path) -> None:
    known = {*FLAGS, *ACTIONS, *ABSENT, "help"}
    for span in code_spans(page):
        if span.startswith("torchrun"):
            continue  # the commands in blocks are parsed; here torchrun's own flags stand
        for name in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", span):
            assert name.replace("_", "-") in known, f"{name_of(page)}: `{span}`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_configuration_keys_in_backticks_exist(page: Path) -> None:
    sections = {key.rsplit(".", n)[0] for key in DEFAULTS for n in range(1, key.count(".") + 1)}
    in_code = source_words()
    last_words = {key.rpartition(".")[2] for key in DEFAULTS}
    for span in code_spans(page):
        for key in re.findall(r"(?<![\w./{<$-])[A-Z][A-Z0-9]*(?:[._][A-Z0-9]+)*(?![\w/}>-])", span):
            if "." in key:
                assert key in DEFAULTS or key in sections, f"{name_of(page)}: `{key}`"
            elif len(key) > 3:
                known = {*DEFAULTS, *sections, *last_words} | in_code
                assert key in known, f"{name_of(page)}: `{key}`"


def source_words() -> set[str]:
    """Every upper-case word in the library and the scripts: variables, constants."""
    rooms = ("swinq", "calib", "train")
    files = [path for room in rooms for path in (REPO_ROOT / room).rglob("*.py")]
    files += [path for path in (REPO_ROOT / "scripts").iterdir() if path.is_file()]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return set(re.findall(r"[A-Z][A-Z0-9_]{3,}", text)) | engine_variables()


def engine_variables() -> set[str]:
    """The environment variables that libswinq reads, by name."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in CSRC.glob("engine/*.cpp"))
    found = set(re.findall(r'\bvariable\("(\w+)"\)', text))
    assert text.count("getenv(") == 1, "libswinq reads variables elsewhere than in variable()"
    assert "SWINQ_CACHE_DIR" in found
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{name_of(page)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{name_of(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_in_backticks_exist(page: Path) -> None:
    places = r"(swinq|calib|csrc|scripts|tests|configs|docs)/[\w./-]*|train/\w+\.py"
    for span in code_spans(page):
        if re.fullmatch(places, span):
            assert (REPO_ROOT / span).exists(), f"{name_of(page)}: `{span}`"


def test_folder_map_of_the_readme_exists_and_leaves_no_room_out() -> None:
    (block,) = [text for _, text in blocks(REPO_ROOT / "README.md", "text") if "swinq/ " in text]
    shown: list[Path] = []
    for line in block.splitlines():
        name = line.split()[0]
        inside = line.startswith(" ")
        shown.append((REPO_ROOT / "swinq" / name) if inside else (REPO_ROOT / name))
    for path in shown:
        assert path.exists(), f"the map shows {path.relative_to(REPO_ROOT)}"
    rooms = {path for path in (REPO_ROOT / "swinq").iterdir() if path.is_dir()}
    rooms = {path for path in rooms if not path.name.startswith("__")} - {
        REPO_ROOT / "swinq/configs"
    }
    assert rooms <= set(shown)


# --- completeness ---


def test_every_flag_is_explained_with_its_key_and_default() -> None:
    rows = table_rows(REPO_ROOT / "docs" / "command-line.md", "flag")
    assert sorted(row[0] for row in rows) == sorted(f"--{name}" for name in FLAGS)
    for flag, key, default, meaning in rows:
        keys = FLAGS[flag.removeprefix("--")].keys
        assert key == (keys[0] if keys else ""), flag
        held = DEFAULTS[key] if key else ""
        assert default == ("" if held in ("", 0, False) else str(held)), flag
        assert meaning, flag


def test_every_recipe_key_is_explained_with_its_default() -> None:
    rows = table_rows(REPO_ROOT / "docs" / "recipes.md", "key")
    rows += table_rows(REPO_ROOT / "docs" / "training.md", "key")
    wanted = {k: v for k, v in DEFAULTS.items() if k.split(".")[0] in defaults.RECIPE_SECTIONS}
    assert {row[0] for row in rows} == set(wanted)
    for key, default, meaning in rows:
        shown = "" if default == "empty" else default
        held = wanted[key]
        text = f"[{', '.join(map(str, held))}]" if isinstance(held, list) else str(held)
        assert shown == text, key
        assert meaning, key


def test_every_variable_of_ours_is_explained() -> None:
    explained = {row[0] for row in table_rows(REPO_ROOT / "docs" / "command-line.md", "variable")}
    read = {word for word in source_words() if word.startswith("SWINQ_")}
    assert read <= explained, sorted(read - explained)
    files = [*(REPO_ROOT / "swinq").rglob("*.py"), *(REPO_ROOT / "scripts").iterdir()]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files if path.is_file())
    for variable in explained - engine_variables():
        assert variable in text, f"nothing reads {variable}"


def test_sections_that_kernels_refer_to_exist() -> None:
    page = CSRC / "NUMERICS.md"
    headings = set(re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.M))
    named = set()
    for path in [*CSRC.rglob("*.h"), *CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh")]:
        text = path.read_text(encoding="utf-8")
        named |= set(re.findall(r'csrc/NUMERICS\.md,\s(?:// )?"([^"]+)"', text))
    assert {"GEMM", "Attention"} <= named <= headings, sorted(named - headings)


def test_folders_of_the_engine_are_explained() -> None:
    rows = table_rows(REPO_ROOT / "docs" / "architecture.md", "folder of `csrc`")
    assert {row[0] for row in rows} == {path.name for path in CSRC.iterdir() if path.is_dir()}
    assert all(purpose for _, purpose in rows)


def test_import_directions_are_those_that_are_enforced() -> None:
    for room, may_import, purpose in table_rows(REPO_ROOT / "docs" / "architecture.md", "room"):
        assert {name.strip() for name in may_import.split(",") if name.strip()} == ROOMS[room], room
        assert purpose


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=name_of)
def test_recipes_of_a_page_fit_swin_t(page: Path, tmp_path: Path) -> None:
    arch = VARIANTS["swin_tiny_patch4_window7_224"]
    with torch.device("meta"):
        model = build_model(arch)
    names = [name for name, module in model.named_modules() if is_quantized(name, module)]
    for number, text in blocks(page, "yaml"):
        path = tmp_path / f"recipe{number}.yaml"
        path.write_text(text)
        resolved = config.default_config()
        config.merge_recipe(resolved, path)
        rules = QuantSpec.from_config(resolved.QUANT).layers
        assert rules, f"{name_of(page)}:{number}"
        assert set(resolve_precisions(names, rules).values()) > {"int8"}


def is_quantized(name: str, module: torch.nn.Module) -> bool:
    """Whether recipes can name the module: the five kinds of Linear, and attention."""
    last = name.rpartition(".")[2]
    return last in ("attn", "qkv", "proj", "fc1", "fc2", "reduction") and "patch_embed" not in name


def test_readme_has_one_place_for_results() -> None:
    text = (REPO_ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    assert text.count(begin) == text.count(end) == 1
    assert text.index(begin) < text.index(end)
    assert len(text.splitlines()) <= 260  # with the tables between the marks
