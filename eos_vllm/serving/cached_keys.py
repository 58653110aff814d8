"""Keys that earlier steps left in the paged KV cache, for scores of images that stand behind cached tokens.

Each attention backend lays out its cache in its own way, and on CPUs each instruction set does: there the layout is
found at start by writing keys that say where they belong. For all, keys are then written by the backend and read back.
"""

from collections.abc import Callable, Sequence

import torch
from vllm.model_executor.layers.attention import Attention

# Where the key of each token and dimension lies in one head's part of a block ``[B * D]``, by kind of cache.
_PLACES: dict[tuple[object, ...], torch.Tensor] = {}
_DIGITS = 256  # bfloat16 holds whole numbers up to here


def _cpu_keys(cache: torch.Tensor, blocks: torch.Tensor, head_size: int) -> torch.Tensor:
    """CPU_ATTN: a block is ``[Hk, 2 B D]`` in an order of its own (plain, transposed, or packed for AMX)."""
    count, heads, block, width = cache.shape
    places = _PLACES[_kind(cache)]
    keys = cache.view(count, heads, block * width)[blocks][..., places].unflatten(-1, (block, head_size))
    return keys.transpose(1, 2).flatten(0, 1)


def _kind(cache: torch.Tensor) -> tuple[object, ...]:
    return (cache.dtype, *cache.shape[1:])


def _find_places(layer: Attention) -> bool:
    """Finds :data:`_PLACES` for the layer's cache, by writing to its block 1; whether each key has one place."""
    cache: torch.Tensor = layer.kv_cache
    block, head_size, heads = _block_size(layer), layer.head_size, layer.num_kv_heads
    names, slots = torch.arange(block * head_size), torch.arange(block, 2 * block)
    digits = []
    for digit in (names % _DIGITS, names // _DIGITS):
        key = digit.view(block, 1, head_size).expand(-1, heads, -1).to(cache.dtype).contiguous()
        # Values hold what is no digit.
        layer.impl.do_kv_cache_update(layer, key, torch.full_like(key, -1), cache, slots)  # type: ignore[attr-defined]
        digits.append(cache[1].reshape(heads, -1).float().long())
    cache[1] = 0
    low, high = digits
    if not all(torch.equal(low[0], other) for other in low) or not all(torch.equal(high[0], other) for other in high):
        return False
    keys = (low[0] >= 0).nonzero().flatten()
    found = high[0, keys] * _DIGITS + low[0, keys]
    if not torch.equal(found.sort().values, names):
        return False
    _PLACES[_kind(cache)] = keys[found.argsort()]
    return True


def _flash_keys(cache: torch.Tensor, blocks: torch.Tensor, head_size: int) -> torch.Tensor:
    """FLASH_ATTN: a block is ``[Hk, B, 2 D]``, keys first."""
    return cache[blocks][..., :head_size].transpose(1, 2).flatten(0, 1)


_READERS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "CPU_ATTN": _cpu_keys,
    "FLASH_ATTN": _flash_keys,
}


def read_keys(layer: Attention, table: torch.Tensor, wanted: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Cached keys of some requests.

    Args:
        layer: the attention layer.
        table: its block table ``[requests, blocks]``.
        wanted: request and number of its leading keys.

    Returns:
        ``[keys, Hk, D]`` for each of ``wanted``.
    """
    read = _READERS[layer.attn_backend.get_name().removeprefix("EosSegment_")]
    cache: torch.Tensor = layer.kv_cache
    size = _block_size(layer)
    return [
        read(cache, table[request, : -(-count // size)].long(), layer.head_size)[:count] for request, count in wanted
    ]


def prove_key_reading(layer: Attention) -> None:
    """Writes random keys through the backend and reads them back; the blocks are zeroed again.

    Raises:
        RuntimeError: other keys come back, or the backend is unknown. The reduction would keep the wrong tokens.
    """
    name = layer.attn_backend.get_name().removeprefix("EosSegment_")
    remedy = "serve with --no-enable-prefix-caching --no-enable-chunked-prefill, or another attention backend"
    cache: torch.Tensor = layer.kv_cache
    if name not in _READERS or cache.shape[0] < 4:
        raise RuntimeError(f"eos: cached keys cannot be read from the KV cache of backend {name}; {remedy}")
    if name == "CPU_ATTN" and not _find_places(layer):
        raise RuntimeError(f"eos: backend {name} stores keys in an unknown layout; {remedy}")
    size = _block_size(layer)
    shape = (size + 3, layer.num_kv_heads, layer.head_size)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(shape, generator=generator).to(cache.device, cache.dtype) for _ in range(2))
    # Blocks 3 and 1 in this order: a reader that ignored the table would fail.
    places = torch.arange(shape[0], device=cache.device)
    slots = torch.where(places < size, 3 * size + places, size + places - size)
    layer.impl.do_kv_cache_update(layer, key, value, cache, slots)  # type: ignore[attr-defined]
    table = torch.tensor([[3, 1]], device=cache.device)
    got = read_keys(layer, table, [(0, shape[0])])[0]
    if got.shape != key.shape or not torch.equal(got, key):
        raise RuntimeError(f"eos: backend {name} stores keys in an unknown layout; {remedy}")
    cache[[1, 3]] = 0


def _block_size(layer: Attention) -> int:
    return int(layer.kv_cache.shape[2])
