"""What ``GET /eos/trace/{id}`` says: one request, what each reducer kept of its images, and what it held of the cache.

All indices are an image's own: its visual tokens before any reduction, row by row from 0.
"""

from pydantic import BaseModel, Field


class ReducerTrace(BaseModel):
    """One reducer and one image."""

    layer: int = Field(description="decoder layer it works behind; -1 is before the decoder")
    entered: list[int] = Field(description="tokens that met the reducer, ascending")
    kept: list[int] = Field(description="those of them that it kept, ascending")
    importance: list[float] | None = Field(
        description="score of each token that entered, as the reducer selected by it; null where it scores nothing"
    )
    share: float | None = Field(
        description="share of the discarded tokens that act on kept ones: the mean of the operator's gate, 0 to 1; "
        "null where none acts"
    )
    assigned: list[int] | None = Field(
        description="for each discarded token (entered and not kept, ascending) the kept token that most of it goes "
        "to; null where discarded tokens are only dropped"
    )


class ImageTrace(BaseModel):
    """One image of the request, in the order of the prompt."""

    tokens: int = Field(description="visual tokens before any reduction")
    rows: int | None = Field(description="of the grid of tokens; null where the image is not one grid")
    columns: int | None = Field(description="of the grid of tokens; null where the image is not one grid")
    boxes: list[tuple[float, float, float, float] | None] | None = Field(
        description="where an image is not one grid: the part of the uploaded image that each token stands for, as "
        "left, top, right, bottom in fractions of its width and height; null for a token without a place (end of a row)"
    )
    reused: bool = Field(
        description="found in the prefix cache, or chosen before the decoder for an earlier request: then nothing was "
        "reduced for this request, and reducers hold only what is remembered"
    )
    reducers: list[ReducerTrace]


class SegmentTrace(BaseModel):
    """The layers between two reducers, when the request ended."""

    layer_from: int = Field(description="first decoder layer of the segment")
    kv_blocks: int = Field(description="KV blocks that the request held, over all KV groups of the segment")
    tokens: int = Field(description="tokens of the request that each layer of the segment had cached")


class Trace(BaseModel):
    """One traced request."""

    id: str = Field(description="of the response")
    budget: str | None = Field(
        description="retain budget that the request named, or that the server chose for it by its load; null where it "
        "had the server's own"
    )
    images: list[ImageTrace]
    segments: list[SegmentTrace]
    hit_tokens: int = Field(description="tokens found in the prefix cache, as the first KV group has them")
