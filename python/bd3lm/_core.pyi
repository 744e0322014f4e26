"""The compiled part of bd3lm, which `bd3lm.data`, `bd3lm.model` and `bd3lm.sample` wrap."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_LEVEL: float

class Schedule:
    def __new__(cls, settings: Mapping[str, Any]) -> Schedule: ...
    def mask_prob(self, t: NDArray[np.float64]) -> NDArray[np.float64]: ...
    def loss_weight(self, t: NDArray[np.float64]) -> NDArray[np.float64]: ...
    def loss_weight_at(self, p: NDArray[np.float64]) -> NDArray[np.float64]: ...
    def inverse(self, p: NDArray[np.float64]) -> NDArray[np.float64]: ...

class Weighting:
    def __new__(cls, name: str, k: float) -> Weighting: ...
    def at(self, schedule: Schedule, t: NDArray[np.float64]) -> NDArray[np.float64]: ...

class NoiseSpec:
    def __new__(
        cls, settings: Mapping[str, Any], gamma: NDArray[np.float32] | None
    ) -> NoiseSpec: ...
    def check(self, seq_len: int, block_size: int) -> None: ...
    def complementary_weights(self, n: int) -> NDArray[np.float64]: ...

def names(kind: str) -> list[str]: ...

_Key = tuple[int, int, int, int]

class TokenStore:
    @staticmethod
    def open(path: str | PathLike[str], verify: bool | None) -> TokenStore: ...
    @staticmethod
    def open_absent(
        path: str | PathLike[str],
        read: Callable[[NDArray[np.int64]], NDArray[np.uint16 | np.int32]],
    ) -> TokenStore: ...
    @staticmethod
    def from_arrays(
        ids: NDArray[np.int32],
        lengths: NDArray[np.uint64],
        special: tuple[int, int, int, int],
    ) -> TokenStore: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def special(self) -> tuple[int, int, int, int]: ...
    @property
    def manifest(self) -> str | None: ...
    def token_counts(self) -> NDArray[np.uint64]: ...
    def document(self, index: int) -> NDArray[np.int64]: ...

class Documents:
    def __new__(cls, inputs: list[str], *, reading: Mapping[str, object]) -> Documents: ...
    def __iter__(self) -> Documents: ...
    def __next__(self) -> tuple[str, bool]: ...

class RowPlan:
    def __new__(
        cls,
        store: TokenStore,
        *,
        seq_len: int,
        block_size: int,
        packing: str,
        row_eos: bool,
        stride: int | None,
        keep_last: bool,
        documents: bool,
    ) -> RowPlan: ...
    def __len__(self) -> int: ...
    @property
    def may_pad(self) -> bool: ...
    @property
    def num_stream_tokens(self) -> int: ...
    def runs(self, rows: NDArray[np.uint64]) -> NDArray[np.int64]: ...
    def gather(
        self, rows: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int32] | None]: ...
    def gather_noised(
        self,
        spec: NoiseSpec,
        key: _Key,
        rows: NDArray[np.uint64],
        block_size: int,
        *,
        x0: NDArray[np.int64],
        noisable: NDArray[np.uint8],
        doc_ids: NDArray[np.int32],
        xt: NDArray[np.int64],
        mask_prob: NDArray[np.float32],
        masked: NDArray[np.int64],
        masked_weight: NDArray[np.float32],
    ) -> tuple[int, int, bool]: ...

def noise(
    spec: NoiseSpec,
    key: _Key,
    seq_len: int,
    block_size: int,
    x0: NDArray[np.int64],
    noisable: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    mask_prob: NDArray[np.float32],
    weight: NDArray[np.float32],
) -> None: ...
def row_order(seed: int, num_rows: int, first: int, count: int) -> NDArray[np.uint64]: ...
def prepare(
    inputs: list[str],
    target: str,
    tokenizer: str,
    special: tuple[int, int, int, int],
    *,
    reading: Mapping[str, object],
    held_out: float | None,
    threads: int,
    progress: Callable[[int, int, int], None] | None,
) -> list[str]: ...
def join_stores(path: str, names: list[str]) -> str: ...
def read_manifest(path: str | PathLike[str]) -> str: ...
def detokenize(name: str, text: str) -> str: ...
def vet_tokenizer(
    json: str, names: Sequence[str]
) -> tuple[int | None, tuple[int, list[int | None]] | None]: ...
def parquet_rows(path: str) -> int: ...
def count_records(inputs: list[str], *, reading: Mapping[str, object]) -> int: ...
def available_threads() -> int: ...

_Tensor = tuple[int, Sequence[int], Sequence[int], str]
_Mask = tuple[Sequence[int], int, int]
_Options = tuple[int, str | None, float]

def attention_forward(
    q: _Tensor, k: _Tensor, v: _Tensor, mask: _Mask, out: _Tensor, lse: int, options: _Options
) -> None: ...
def attention_backward(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    mask: _Mask,
    out: _Tensor,
    lse: int,
    d_out: _Tensor,
    dq: _Tensor,
    dk: _Tensor,
    dv: _Tensor,
    options: _Options,
) -> None: ...
def use_openmp(address: int) -> None: ...
def attention_isas() -> list[str]: ...
def cross_entropy(
    logits: NDArray[np.float32] | NDArray[np.int16],
    bias: NDArray[np.float32],
    target: NDArray[np.int64],
    weight: NDArray[np.float32] | None,
    mask_id: int | None,
    nll: NDArray[np.float32],
    d_bias: NDArray[np.float32],
    threads: int,
) -> None: ...
def activate(
    activation: str,
    x: NDArray[np.float32] | NDArray[np.int16],
    bias: NDArray[np.float32],
    out: NDArray[np.float32] | NDArray[np.int16],
    threads: int,
) -> None: ...
def activate_backward(
    activation: str,
    x: NDArray[np.float32] | NDArray[np.int16],
    bias: NDArray[np.float32],
    d: NDArray[np.float32] | NDArray[np.int16],
    out: NDArray[np.float32] | NDArray[np.int16],
    d_bias: NDArray[np.float32],
    threads: int,
) -> None: ...
def dropout_add(
    h: NDArray[np.float32],
    x: NDArray[np.float32] | NDArray[np.int16],
    bias: NDArray[np.float32],
    seed: int,
    p: float,
    out: NDArray[np.float32],
    threads: int,
) -> None: ...
def dropout_add_backward(
    d_out: NDArray[np.float32],
    seed: int,
    p: float,
    d_x: NDArray[np.float32] | NDArray[np.int16],
    d_bias: NDArray[np.float32],
    threads: int,
) -> None: ...
def add_to(
    total: NDArray[np.float32],
    x: NDArray[np.float32] | NDArray[np.int16],
    first: bool,
    threads: int,
) -> None: ...
def normalise(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    centred: bool,
    eps: float,
    out: NDArray[np.float32] | NDArray[np.int16],
    moments: NDArray[np.float32],
    threads: int,
) -> None: ...
def normalise_backward(
    d_out: NDArray[np.float32] | NDArray[np.int16],
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    centred: bool,
    moments: NDArray[np.float32],
    residual: NDArray[np.float32] | None,
    d_x: NDArray[np.float32],
    d_weight: NDArray[np.float32],
    d_bias: NDArray[np.float32],
    threads: int,
) -> None: ...

Rope = tuple[NDArray[np.float32], NDArray[np.float32], int, bool]

def rotate_heads(
    heads: NDArray[np.float32] | NDArray[np.int16],
    place: tuple[int, int],
    count: int,
    rope: Rope,
    threads: int,
) -> None: ...
def move_heads(
    source: NDArray[np.float32] | NDArray[np.int16],
    here: tuple[int, int],
    target: NDArray[np.float32] | NDArray[np.int16],
    there: tuple[int, int],
    count: int,
    rope: Rope | None,
    threads: int,
) -> None: ...
def draw(
    logits: NDArray[np.float32],
    shaped: NDArray[np.float32] | None,
    uniform: NDArray[np.float64],
    token: NDArray[np.int64],
    log_p: NDArray[np.float64],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float,
    forbidden: Sequence[int],
    threads: int,
) -> None: ...
def distribution(
    logits: NDArray[np.float32],
    mass: NDArray[np.float32],
    total: NDArray[np.float64],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float,
    forbidden: Sequence[int],
    threads: int,
) -> None: ...

class PackedLinear:
    def __new__(
        cls,
        weight: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        inputs: int,
        bf16: bool,
    ) -> PackedLinear: ...
    def apply(self, x: NDArray[np.float32], out: NDArray[np.float32], threads: int) -> None: ...

_Norm = tuple[NDArray[np.float32], NDArray[np.float32] | None, bool, float]

class PackedBlock:
    def __new__(
        cls,
        *,
        norm1: _Norm,
        qkv: PackedLinear,
        q_norm: _Norm | None,
        k_norm: _Norm | None,
        out: PackedLinear,
        norm2: _Norm,
        up: PackedLinear,
        mlp: str,
        down: PackedLinear,
        head_width: int,
    ) -> PackedBlock: ...
    def project(
        self,
        h: NDArray[np.float32],
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        q: NDArray[np.float32],
        k: NDArray[np.float32],
        v: NDArray[np.float32],
        capacity: int,
        first: int,
        threads: int,
    ) -> None: ...
    def finish(
        self, attended: NDArray[np.float32], h: NDArray[np.float32], threads: int
    ) -> None: ...
