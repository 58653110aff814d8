"""What ``GET /eos/trace/{id}`` says: one request, what each reducer kept of its images, and what it held of the cache.

All indices are an image's own: its visual tokens before any reduction, row by row from 0.
"""

from collections.abc import Iterable, Mapping

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


# What engine and workers send, of which the document is made.

BEFORE = -1  # number of the reducer before the decoder; those within it count from 0


class Record(BaseModel):
    """What a worker recorded of one reducer and one image; indices count the tokens that entered."""

    image: int
    reducer: int
    chosen: list[int]
    importance: list[float] | None = None
    share: float | None = None
    assigned: list[int] | None = None  # places among ``chosen``
    remembered: bool = False


class ImageOutline(BaseModel):
    """What the scheduler knows of an image.

    ``counts`` are the visual tokens of it in each segment of the decoder; ``covered`` says that it was found in the
    prefix cache when the request was first scheduled.
    """

    tokens: int
    rows: int | None = None
    columns: int | None = None
    boxes: list[tuple[float, float, float, float] | None] | None = None
    counts: list[int]
    end: int
    covered: bool = False


class Outline(BaseModel):
    """What the scheduler knows of a request; ``layers`` are those of the reducers within the decoder."""

    id: str
    budget: str | None
    selects: bool
    layers: list[int]
    images: list[ImageOutline]
    segments: list[SegmentTrace] = []
    hit_tokens: int = 0


def build_trace(outline: Outline, records: Iterable[Record]) -> Trace:
    """Puts the document together.

    Args:
        outline: of the request.
        records: of all workers; with pipeline stages each has those of its own layers.

    Raises:
        RuntimeError: an image was reduced for this request, and no worker recorded it.
    """
    found = {(record.image, record.reducer): record for record in records}
    return Trace(
        id=outline.id,
        budget=outline.budget,
        images=[_image(i, image, outline, found) for i, image in enumerate(outline.images)],
        segments=outline.segments,
        hit_tokens=outline.hit_tokens,
    )


def _image(i: int, image: ImageOutline, outline: Outline, found: Mapping[tuple[int, int], Record]) -> ImageTrace:
    ids, reducers = list(range(image.tokens)), []
    reduced = any((i, r) in found for r in range(len(outline.layers)))
    reused = image.covered and not reduced
    if outline.selects and image.counts[0] == image.tokens:
        reducers.append(_untouched(-1, ids))
    elif outline.selects:
        selection = found.get((i, BEFORE))
        if selection is None:  # of rules that mix tokens nothing is remembered
            return _trace_of(image, True, [])
        reused = reused or (selection.remembered and not outline.layers)
        reducers.append(_reduced(-1, ids, selection))
        ids = reducers[-1].kept
        if len(ids) != image.counts[0]:  # some tokens that entered the decoder are no patches
            return _trace_of(image, reused, reducers)
    inside: list[ReducerTrace] = []
    for r, (layer, left) in enumerate(zip(outline.layers, image.counts[1:], strict=True)):
        record = found.get((i, r))
        if left == len(ids):
            inside.append(_untouched(layer, ids))
        elif left == 0:
            inside.append(ReducerTrace(layer=layer, entered=ids, kept=[], importance=None, share=None, assigned=None))
        elif record is not None:
            inside.append(_reduced(layer, ids, record))
        elif reused:
            inside = []
            break
        else:
            raise RuntimeError(
                f"eos: image {i} of {outline.id} was reduced after layer {layer}, and nobody recorded it"
            )
        ids = inside[-1].kept
    return _trace_of(image, reused, [*reducers, *inside])


def _trace_of(image: ImageOutline, reused: bool, reducers: list[ReducerTrace]) -> ImageTrace:
    place = image.model_dump(include={"tokens", "rows", "columns", "boxes"})
    return ImageTrace(**place, reused=reused, reducers=reducers)


def _untouched(layer: int, ids: list[int]) -> ReducerTrace:
    return ReducerTrace(layer=layer, entered=ids, kept=ids, importance=None, share=None, assigned=None)


def _reduced(layer: int, ids: list[int], record: Record) -> ReducerTrace:
    kept = [ids[place] for place in record.chosen]
    return ReducerTrace(
        layer=layer,
        entered=ids,
        kept=kept,
        importance=record.importance,
        share=record.share,
        assigned=None if record.assigned is None else [kept[place] for place in record.assigned],
    )
