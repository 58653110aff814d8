"""The half that would compile."""

from typing import Any

from triton.backends.compiler import BaseBackend


class NothingToCompile(BaseBackend):
    """Supports the target ``cpu``, and is never asked for code."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict) -> object:
        raise NotImplementedError("kernels are interpreted")

    def add_stages(self, stages: dict, options: object, language: Any) -> None:
        raise NotImplementedError("kernels are interpreted")

    def load_dialects(self, context: Any) -> None: ...

    def get_module_map(self) -> dict[str, Any]:
        return {}
