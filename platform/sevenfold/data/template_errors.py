"""What is wrong with a chat template that cannot be rendered, and in which line."""

from __future__ import annotations

import jinja2
from jinja2.exceptions import SecurityError

from sevenfold.data.template_limits import TemplateLimitError
from sevenfold.errors import first_line

# They say nothing about the conversation: it is the template that cannot be compiled, asks for what
# no template may have, or never ends.
_FAULTS = (
    *(TemplateLimitError, SecurityError, jinja2.TemplateSyntaxError, jinja2.TemplateRuntimeError),
    *(jinja2.TemplateNotFound, RecursionError, MemoryError, OverflowError, SyntaxError),
)


def is_fault_of_template(error: Exception) -> bool:
    """Returns whether an error of a rendering is the template's, whatever the conversation is.

    A template refuses a conversation with raise_exception (TemplateError itself), or by an error
    about a value that the conversation lacks.
    """
    return isinstance(error, _FAULTS) and not isinstance(error, jinja2.UndefinedError)


def template_line(error: Exception) -> int:
    """Returns the line of a template in which an error occurred; 1 if it is not known."""
    line = getattr(error, "lineno", None)
    if isinstance(error, jinja2.TemplateSyntaxError) and isinstance(line, int):
        return line
    found, traceback = 1, error.__traceback__
    while traceback is not None:
        # Jinja gives its code this name, and the lines of the template
        if traceback.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            found = traceback.tb_lineno
        traceback = traceback.tb_next
    return found


def describe(error: Exception) -> str:
    """Returns what is wrong, in one line."""
    if isinstance(error, RecursionError):
        return "it calls itself without end, or is nested too deeply"
    if isinstance(error, jinja2.TemplateNotFound):
        return f"it includes another template, {first_line(error)}"
    if isinstance(error, TemplateLimitError | jinja2.TemplateError):
        return first_line(error)
    return f"{first_line(error)} ({type(error).__name__})"
