"""The rules of benchmark texts, against the same rules as plain regular expressions."""

import json
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3lm.data import Dataset, detokenize, load_tokenizer, prepare
from bd3lm.errors import ConfigError


def literal(*rules):
    def apply(text):
        for old, new in rules:
            text = text.replace(old, new)
        return text

    return apply


def wikitext(x):
    x = x.replace("s '", "s'")
    x = re.sub(r"/' [0-9]/", lambda _: "/'[0-9]/", x)
    x = literal((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))(x)
    for mark in ":;.!?,":
        x = x.replace(f" {mark} ", f"{mark} ")
    for opens, closes in ("()", "[]", "{}", '""', "''"):
        o, c = re.escape(opens), re.escape(closes)
        x = re.sub(rf"{o}\s*([^{c}]*?)\s*{c}", lambda m, o=opens, c=closes: o + m[1] + c, x)
    x = literal(("= = = =", "===="), ("= = =", "==="), ("= =", "=="))(x)
    return literal((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))(x)


def lm1b(x):
    x = literal(("http : / / ", "http://"), ("https : / / ", "https://"))(x)
    x = re.sub(r" '(\w+)", r"'\1", x)
    x = re.sub(r" (\w+) \. ", r" \1. ", x)
    x = re.sub(r" (\w+) \.$", r" \1.", x)
    x = re.sub(r" \?$", "?", x.replace(" ? ", "? "))
    x = re.sub(r" !$", "!", x.replace(" ! ", "! "))
    x = literal((" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/"))(x)
    x = re.sub(r'" ([^"]+) "', r'"\1"', x)
    x = re.sub(r"' ([^']+) '", r"'\1'", x)
    x = re.sub(r"\( ([^()]+) \)", r"(\1)", x)
    x = re.sub(r"\[ ([^\[\]]+) \]", r"[\1]", x)
    return literal(("$ ", "$"), ("£ ", "£"))(x)


def ptb(x):
    x = literal((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/"))(x)
    for _ in range(10):
        x = x.replace(" N ", " 1 ")
    return literal(("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?"))(x)


RULES = {
    "lm1b": lm1b,
    "wikitext": wikitext,
    "ptb": ptb,
    "lambada": lambda x: "\n" + x.replace("“", '"').replace("”", '"').strip(),
    "scientific_papers": lambda x: lm1b(wikitext(x)),
}
PIECES = st.sampled_from(
    " |  |\n|a|is|s|N|é|日|'|''|'s|n't|.|,|?|!|:|;|/|\\/|(|)|[|]|{|}|\"|“|”|$|£|# 1|<unk>|°|@-@|@,@"
    "|= = =|http : / / |1|2".split("|")
)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(PIECES, max_size=30))
def test_every_rule_in_its_order(name, pieces):
    text = "".join(pieces)
    assert detokenize(name, text) == RULES[name](text)


ODD = st.sampled_from(
    [*" '\"()[].|a²½ⅣⒶ‿_é日一", "e\u0301", *"\u0301\u093f\u200d\x1c\x1d\x1e\x1f\x85\xa0\u3000\t"]
)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(ODD, max_size=30))
def test_odd_characters(name, pieces):
    text = "".join(pieces)
    assert detokenize(name, text) == RULES[name](text)


def test_letters_and_spaces_are_those_of_the_rules_language():
    known = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    known = [c for c in known if c not in "'\""]
    for name, form in (("lm1b", " '{}|"), ("wikitext", '"{}x"|')):
        text = "".join(form.format(c) for c in known)
        found = detokenize(name, text).split("|")
        wanted = RULES[name](text).split("|")
        assert [(a, b) for a, b in zip(found, wanted, strict=True) if a != b] == []


@pytest.mark.parametrize(
    ("name", "file"), [("lm1b", "lm1b_heldout.txt"), ("wikitext", "wikitext_raw_test.jsonl")]
)
def test_the_benchmark_texts(name, file, shared_data):
    lines = (shared_data / "zero_shot" / file).read_text(encoding="utf-8").splitlines()
    if file.endswith("jsonl"):
        lines = [json.loads(line)["text"] for line in lines]
    changed = 0
    for line in lines:
        found = detokenize(name, line)
        assert found == RULES[name](line)
        changed += found != line
    assert changed > len(lines) / 3


def test_prepared_sets_say_how_their_text_was_made(tmp_path):
    source = tmp_path / "x.txt"
    source.write_text("He said , really ?\nIt 's so .\n")
    tokenizer = load_tokenizer("default")
    for eos in (True, False):
        out = tmp_path / f"set{eos}"
        (manifest,) = prepare([source], tokenizer, out, lines=True, detokenizer="lm1b", eos=eos)
        data = Dataset(out)
        texts = ["He said, really?", "It's so."]
        ends = [tokenizer.eos_id] if eos else []
        assert [data.document(i).tolist() for i in range(2)] == [
            tokenizer.encode(text) + ends for text in texts
        ]
        assert manifest.num_bytes == sum(len(text) for text in texts)
        written = json.loads((out / "manifest.json").read_text())
        assert written["detokenizer"] == "lm1b"
        assert written.get("no_eos", False) is not eos


def test_a_detokenizer_that_does_not_exist(tmp_path):
    source = tmp_path / "x.txt"
    source.write_text("a")
    with pytest.raises(ConfigError, match="detokenizer = moses: must be one of lm1b, "):
        prepare([source], load_tokenizer("default"), tmp_path / "set", detokenizer="moses")
    assert not (tmp_path / "set").exists()
