"""The one error that a user's input can cause."""


class InputError(ValueError):
    """Input that cannot be used, found before any long work starts.

    Attributes:
        what: what is wrong, with the value that was got.
        where: the file, flag or argument it was found in.
        expected: what would have been right.
        fix: what the user can do about it.
    """

    def __init__(self, what, *, where="", expected="", fix=""):
        self.what, self.where, self.expected, self.fix = what, str(where), expected, fix
        lines = [f"{self.where}: {what}" if where else what]
        if expected:
            lines.append(f"  expected: {expected}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))

    def as_dict(self):
        """The error as the `--json` output of every tool shows it."""
        return {"what": self.what, "where": self.where, "expected": self.expected, "fix": self.fix}
