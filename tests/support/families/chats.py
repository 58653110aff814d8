"""How each family's chats are spelled: tokenizer, chat template, image placeholder, and prompts in that form.

The templates give the same text as those of the published checkpoints for the chats that tests hold; they are written
anew and know nothing else (no system turns but Qwen2.5-VL's default, no video, no tools).
"""

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as KeepsAsIs
from transformers import PreTrainedTokenizerFast

from eos_vllm.models.model_files import CHAT_TEMPLATE
from eos_vllm.models.tokenizer import BOS, EOS, IMAGE, PAD, UNK, build_tokenizer

QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<video>",
)  # fmt: skip
VOCAB = 288  # the last ids have no token, as in Qwen's padded vocabularies
MARK = "[I]"  # stands for an image in the texts that :meth:`Chat.ask` takes

# Mistral's instruction format: no generation prompt of its own, " [/INST]" closes the question either way.
_MISTRAL = """\
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- '[INST] ' -}}
    {%- if message['content'] is string -%}
      {{- message['content'] -}}
    {%- else -%}
      {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
      {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
    {%- endif -%}
    {{- ' [/INST]' -}}
  {%- else -%}
    {{- ' ' -}}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}{%- endif -%}
    {{- eos_token + ' ' -}}
  {%- endif -%}
{%- endfor -%}
"""
# ChatML as OneVision writes it: images in front, no line break behind a turn.
_ONEVISION = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + ' ' -}}
  {%- if message['content'] is string -%}
    {{- '\\n' + message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}{{- '\\n' + part['text'] -}}{%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
# ChatML as Qwen writes it: parts in the order of the message.
_QWEN = """\
{%- for message in messages -%}
  {{- DEFAULT if loop.first and message['role'] != 'system' -}}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {{- '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
_SYSTEM = "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n"


@dataclass(frozen=True)
class Chat:
    """One family's way of asking.

    Attributes:
        template: chat template (Jinja).
        image: what stands for an image, with the line break that the template puts around it.
        begin: text in front of a question.
        end: text behind a question, the generation prompt included.
        begins_with_bos: whether the tokenizer puts a begin token in front.
    """

    template: str
    image: str
    begin: str
    end: str
    begins_with_bos: bool = False

    def ask(self, text: str) -> str:
        """The prompt of a first turn; each :data:`MARK` in ``text`` becomes an image."""
        return self.begin + text.replace(MARK, self.image) + self.end

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a byte, and the special tokens of all families."""
        core: Tokenizer = build_tokenizer()
        core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_TOKENS])
        if not self.begins_with_bos:
            core.post_processor = KeepsAsIs(trim_offsets=False)
        assert isinstance(core.pre_tokenizer, ByteLevel)
        assert core.get_vocab_size() <= VOCAB
        return PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token=BOS, eos_token=EOS, unk_token=UNK, pad_token=PAD, padding_side="left",
            clean_up_tokenization_spaces=False, model_max_length=4096,
        )  # fmt: skip


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_ENDS = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
VICUNA = Chat(CHAT_TEMPLATE, f"{IMAGE}\n", "USER: ", " ASSISTANT:", begins_with_bos=True)
MISTRAL = Chat(_MISTRAL, f"{IMAGE}\n", "[INST] ", " [/INST]", begins_with_bos=True)
ONEVISION = Chat(_ONEVISION, f"{IMAGE}\n", "<|im_start|>user ", "<|im_end|><|im_start|>assistant\n")
QWEN2_5 = Chat(
    _QWEN.replace("DEFAULT", f"'{_SYSTEM}'"),
    _QWEN_IMAGE,
    _SYSTEM.replace("\\n", "\n") + _QWEN_ENDS[0],
    _QWEN_ENDS[1],
)
QWEN3 = Chat(_QWEN.replace("DEFAULT", "''"), _QWEN_IMAGE, *_QWEN_ENDS)


def token_id(token: str) -> int:
    """Id of a special token; the same in every family."""
    found = QWEN2_5.tokenizer().convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found
