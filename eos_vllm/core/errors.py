"""Errors that a user can mend: one line that names field, value and remedy."""


class EosError(ValueError):
    """A mistake in something that the user gave; its text is fit to be shown without a traceback."""

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(f"{_shown(field, 120)}={_shown(repr(value), 120)}: {_shown(problem)}; {_shown(remedy)}")

    def __reduce__(self) -> tuple:
        """Errors cross processes; the default would call the class with the finished text alone."""
        return type(self), (self.field, self.value, self.problem, self.remedy)


class ProfileError(EosError):
    """A profile that cannot be read, is invalid, or does not fit the model."""


class BudgetError(EosError):
    """A retain budget that is no number, out of range, or below what the profile's layers can reach."""


class SettingError(EosError):
    """A server setting that cannot go together with an active profile."""


def _shown(text: str, limit: int = 500) -> str:
    """Text of bounded length on one line; names and messages may quote whatever a file or request held."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= limit else line[: limit - 3] + "..."
