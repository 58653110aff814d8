"""What may see what while several questions about an image are packed behind it."""

import torch


def attention_masks(segment: torch.Tensor, before: int, visual: int, blind: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What may see what, in the layers that are to be blind and in the others, ``[B, 1, S, S]`` bool each.

    What stands before the text is plainly causal; each question sees that and itself, with ``blind`` not the image in
    the former.
    """
    owner = torch.cat([segment.new_full((len(segment), before + visual), -2), segment], dim=1)
    place = torch.arange(owner.shape[1], device=segment.device)
    same = (owner[:, None, :] == -2) | (owner[:, None, :] == owner[:, :, None])
    late = ((place[:, None] >= place) & same)[:, None]
    if not blind:
        return late, late
    is_text, is_visual = place >= before + visual, (place >= before) & (place < before + visual)
    return late & ~(is_text[:, None] & is_visual), late
