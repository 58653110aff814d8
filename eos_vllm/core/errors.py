"""Errors that a user can mend: one line that names field, value and remedy."""


class EosError(ValueError):
    """A mistake in something that the user gave; its text is fit to be shown without a traceback."""

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{field}={shown}: {problem}; {remedy}".replace("\n", " "))


class ProfileError(EosError):
    """A profile that cannot be read, is invalid, or does not fit the model."""


class BudgetError(EosError):
    """A retain budget that is no number, out of range, or below what the profile's layers can reach."""


class SettingError(EosError):
    """A server setting that cannot go together with an active profile."""
