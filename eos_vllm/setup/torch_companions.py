"""Keep torch's companion packages importable where their compiled parts cannot be loaded.

CUDA wheels of torchvision, torchaudio and torchcodec cannot load their shared objects beside CPU torch, and each fails
in its own way, although vLLM and transformers use only their pure-Python parts, or none at all, for images and text:

* torchvision attaches shape rules to operators that nobody declared ("operator torchvision::nms does not exist").
  Remedy: declare those operators.
* torchaudio raises OSError, and transformers imports it without a guard. Remedy: let it find that it has no extension,
  a state that it is made for.
* torchcodec raises OSError where vLLM expects ImportError. Remedy: raise that.

Using a missing compiled part still fails, with the package's own message. Where the shared objects load, nothing is
changed.

`eos_vllm.setup.site_hook` copies this file as it stands into site-packages, beside a `.pth` file that calls `install`
at every start of the interpreter. It must therefore import nothing but `sys` up here and know nothing of eos_vllm.
"""

import sys

# Only the operators whose shape rule torchvision registers without first asking whether its extension is loaded.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# torch drops a library's declarations when the object that made them is collected.
_libraries: list[object] = []


def declare_operators(extension):
    """Declare what torchvision registers shape rules for, unless `extension` (torchvision.extension) has loaded it."""
    import torch

    if extension._has_ops():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    for schema in SCHEMAS:
        # A second import of torchvision in one process finds the declarations in place.
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)


def tolerate_missing_extension(utils):
    """Make torchaudio's `_load_lib` answer False, "no extension", where the extension's file cannot be loaded."""
    load = utils._load_lib

    def load_if_possible(*args, **kwargs):
        try:
            return load(*args, **kwargs)
        except OSError:
            return False

    utils._load_lib = load_if_possible


# Module name: what to do with the module right after it has run.
AFTER = {
    "torchvision.extension": declare_operators,
    "torchaudio._extension.utils": tolerate_missing_extension,
    "torchcodec": None,
}


class CompanionLoader:
    """The real loader of a module, which also does what the module needs (`AFTER`)."""

    def __init__(self, loader):
        """Wrap `loader`."""
        self._loader = loader

    def __getattr__(self, name):
        """Leave everything but running the module to the real loader."""
        return getattr(self._loader, name)

    def create_module(self, spec):
        """Create the module as the real loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module):
        """Run the module, then its `AFTER`; a shared object that cannot be loaded becomes an ImportError."""
        try:
            self._loader.exec_module(module)
        except OSError as error:
            raise ImportError(f"{module.__name__} does not fit the installed torch: {error}") from error
        after = AFTER[module.__name__]
        if after is None:
            return
        try:
            after(module)
        except Exception as error:
            # The package's own import then goes on, and says best what it lacks.
            import warnings

            warnings.warn(f"{module.__name__} could not be prepared: {error!r}", RuntimeWarning, stacklevel=2)


class CompanionFinder:
    """Meta-path finder that lets the others find the modules of `AFTER` and wraps their loaders."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Return the module's spec with a `CompanionLoader`, or None for all other modules."""
        if name not in AFTER:
            return None
        for finder in sys.meta_path:
            spec = None if finder is cls else finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = CompanionLoader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


def install():
    """Put the finder at the front of the meta path, once for each process."""
    # By name, because the copy in site-packages and the original in eos_vllm are different classes.
    if not any(getattr(finder, "__name__", "") == CompanionFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, CompanionFinder)
