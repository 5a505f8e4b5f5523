"""What a wrong recipe is told: the field by its path, and what it should have been."""

import difflib

from depthlm_jax.errors import InputError


def unknown_key(path: str, known: list[str]) -> InputError:
    """Returns the error for a config path that is no field.

    Args:
      path: what was given.
      known: paths of fields; the nearest one is proposed, those in the section nearest to `path` are listed.
    """
    parts = path.split(".")
    sections = [".".join(parts[:end]) + "." for end in range(len(parts), 0, -1)] + [""]
    section = next(section for section in sections if any(field.startswith(section) for field in known))
    depth = section.count(".") + 1
    inside = [field for field in known if field.startswith(section)]
    siblings = sorted({".".join(field.split(".")[:depth]) for field in inside})
    is_section = section == f"{path}."
    nearest = difflib.get_close_matches(path, inside if is_section else known, n=1, cutoff=0.0)
    return InputError(
        f"config: unknown field {path!r}", found="a section" if is_section else path,
        expected=f"one of {siblings}", fix=f"did you mean {nearest[0]!r}?",
    )  # fmt: skip


def bad_value(path: str, found: object, expected: str) -> InputError:
    return InputError(f"config: bad value of {path}", found=found, expected=expected, fix=f"set --config.{path}=…")
