"""Published vocabularies in the fast path: the ids are those of the tokenizers library."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
import tokenizers

from bd3lm.data import Dataset, load_tokenizer, prepare, read_documents

ROOT = Path(__file__).parents[2]


def vocabularies():
    file = ROOT / "benches" / "python" / "vocabularies.py"
    spec = importlib.util.spec_from_file_location("vocabularies", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PUBLISHED = dict(vocabularies().published())


def texts():
    """English, and random strings of every plane that has letters."""
    source = ROOT / "python" / "bd3lm" / "assets" / "default_corpus.jsonl.xz"
    documents = [text[:20_000] for text in read_documents(source)[:40]]
    draw = random.Random(1)
    ranges = [(0, 0x250), (0x250, 0x600), (0x900, 0x2100), (0x2100, 0x3200), (0x3200, 0xD7FF)]
    ranges += [(0xE000, 0x10000), (0x10000, 0x1E000), (0x1E000, 0x1FC00)]
    words = (
        "the House's they'LL 'ſ  \n\n \r\n \t 123 4567 ... != ▁ ▁▁ e\u0301 한국 日本 </s>".split(
            " "
        )
    )
    for _ in range(300):
        parts = []
        for _ in range(draw.randrange(1, 60)):
            low, high = draw.choice(ranges)
            letter = chr(draw.randrange(low, high))
            parts.append(draw.choice([letter, draw.choice(words), " "]))
        documents.append("".join(parts).encode("utf-8", "replace").decode())
    return [text for text in documents if text]


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_are_the_librarys(name, tmp_path):
    (tmp_path / "tokenizer.json").write_text(PUBLISHED[name], encoding="utf-8")
    oracle = tokenizers.Tokenizer.from_str(PUBLISHED[name])
    documents = texts()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "texts.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    prepare([tmp_path / "texts.jsonl"], tokenizer, tmp_path / "set")
    data = Dataset(tmp_path / "set")
    assert data.num_documents == len(documents)
    for index, encoded in enumerate(oracle.encode_batch(documents, add_special_tokens=False)):
        assert data.document(index).tolist()[:-1] == encoded.ids, documents[index][:100]


def test_every_package_is_there():
    if not PUBLISHED:
        pytest.skip("no package with a published tokenizer is here; make check-extras has them")
    assert {"Llama 3", "Qwen 3", "Mistral", "DeepSeek", "cl100k", "o200k"} <= PUBLISHED.keys()
