"""What the `Attributes:` section of a class says of each of them."""

import inspect
import re

_ENTRY = re.compile(r"^    (\w+): (.*)$")
_CONTINUED = re.compile(r"^ {8,}(\S.*)$")


def attribute_descriptions(owner: type) -> dict[str, str]:
    """The description of each attribute that the class's docstring lists, as one line.

    An entry is `name: words`; lines that are indented further go on with it.
    """
    lines = (inspect.getdoc(owner) or "").splitlines()
    if "Attributes:" not in lines:
        return {}
    found: dict[str, str] = {}
    name = ""
    for line in lines[lines.index("Attributes:") + 1 :]:
        if entry := _ENTRY.match(line):
            name = entry[1]
            found[name] = entry[2]
        elif name and (continued := _CONTINUED.match(line)):
            found[name] += " " + continued[1]
        elif line.strip():
            break  # the next section
    return found
