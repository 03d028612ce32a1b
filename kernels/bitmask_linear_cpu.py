"""`bitmask_linear` on the CPU: a product of few tokens that reads the compressed weight, and a quick decompression.

AVX-512 has an instruction for it, which spreads the next values over the lanes of a mask, here 16 bits of the weight's.
Without it (and without a compiler, `native.py`) the weight is made dense by torch.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .native import native, run_split

FEW = 8
"""Tokens up to which the compressed weight is read as it is."""

_SOURCE = """
#include <stdint.h>
#include <string.h>
#include <immintrin.h>

// Sixteen weights of a row from channel c on; *next moves behind the values that were read.
static inline __m512 spread(const uint8_t *bits, int64_t c, int64_t k, const float **next) {
  uint16_t mask;
  if (k - c > 8) memcpy(&mask, bits + c / 8, 2);
  else mask = bits[c / 8];
  __m512 w = _mm512_maskz_expandloadu_ps(mask, *next);
  *next += __builtin_popcount(mask);
  return w;
}

static inline __mmask16 inside(int64_t c, int64_t k) {
  return k - c >= 16 ? 0xffff : (__mmask16)((1u << (k - c)) - 1);
}

// Two rows at a time, since each waits for how many values the last step took; T is a constant, so that sums stay in
// registers.
static inline __attribute__((always_inline)) void
rows(const float *x, const uint8_t *bits, const float *values, const int64_t *starts, const float *bias, float *y,
     const int T, int64_t start, int64_t stop, int64_t k, int64_t n) {
  const int64_t stride = (k + 7) / 8;
  for (int64_t row = start; row < stop; row += 2) {
    const int64_t other = row + 1 < stop ? row + 1 : row;
    const float *first = values + starts[row], *second = values + starts[other];
    __m512 one[T], two[T];
    for (int t = 0; t < T; ++t) one[t] = two[t] = _mm512_setzero_ps();
    for (int64_t c = 0; c < k; c += 16) {
      __m512 w = spread(bits + row * stride, c, k, &first), v = spread(bits + other * stride, c, k, &second);
      for (int t = 0; t < T; ++t) {
        __m512 xs = _mm512_maskz_loadu_ps(inside(c, k), x + t * k + c);
        one[t] = _mm512_fmadd_ps(w, xs, one[t]);
        two[t] = _mm512_fmadd_ps(v, xs, two[t]);
      }
    }
    for (int t = 0; t < T; ++t) {
      y[t * n + row] = _mm512_reduce_add_ps(one[t]) + (bias ? bias[row] : 0.0f);
      y[t * n + other] = _mm512_reduce_add_ps(two[t]) + (bias ? bias[other] : 0.0f);
    }
  }
}

void product(const float *x, const uint8_t *bits, const float *values, const int64_t *starts, const float *bias,
             float *y, int64_t tokens, int64_t start, int64_t stop, int64_t k, int64_t n) {
#define CASE(T) case T: rows(x, bits, values, starts, bias, y, T, start, stop, k, n); break;
  switch (tokens) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
}

void unpack(const uint8_t *bits, const float *values, const int64_t *starts, float *y, int64_t start, int64_t stop,
            int64_t k) {
  for (int64_t row = start; row < stop; ++row) {
    const float *next = values + starts[row];
    for (int64_t c = 0; c < k; c += 16)
      _mm512_mask_storeu_ps(y + row * k + c, inside(c, k), spread(bits + row * ((k + 7) / 8), c, k, &next));
  }
}
"""


def few_tokens(x: Tensor, bits: Tensor, values: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor | None:
    """The product for at most `FEW` tokens, None where there is no quick one."""
    k, n = x.shape[-1], len(bits)
    tokens = x.numel() // k
    library = _library() if x.dtype == torch.float32 and 0 < tokens <= FEW else None
    if library is None:
        return None
    x, bits, values, starts = x.contiguous(), bits.contiguous(), values.contiguous(), starts.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    given = (x.data_ptr(), bits.data_ptr(), values.data_ptr(), starts.data_ptr())
    given += (None if bias is None else bias.data_ptr(), y.data_ptr(), tokens)
    run_split(n, n * k, lambda start, stop: library.product(*given, start, stop, k, n))
    return y


def unpacked(bits: Tensor, values: Tensor, starts: Tensor, k: int) -> Tensor | None:
    """The dense weight [N, k], None where there is no quick way."""
    library = _library() if values.dtype == torch.float32 else None
    if library is None:
        return None
    bits, values, starts = bits.contiguous(), values.contiguous(), starts.contiguous()
    weight = values.new_empty(len(bits), k)
    given = (bits.data_ptr(), values.data_ptr(), starts.data_ptr(), weight.data_ptr())
    run_split(len(bits), len(bits) * k, lambda start, stop: library.unpack(*given, start, stop, k))
    return weight


@cache
def _library() -> Any:
    if not torch.cpu.get_capabilities().get("avx512_f", False):
        return None
    library = native(_SOURCE)
    if library is not None:
        library.product.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 5
        library.unpack.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
        library.product.restype = library.unpack.restype = None
    return library
