"""The ring F_7[X]/(X^5): polynomials of degree at most 4 with coefficients modulo 7.

Composition of representatives is not well defined on the quotient where g(0) is not 0; here, as the
paper leaves open, it is that of the representatives of degree at most 4, reduced afterwards.
"""

MODULUS, SIZE = 7, 5
Element = tuple[int, ...]  # coefficients, the constant first


def negate(f: Element) -> Element:
    """The element that gives 0 when added."""
    return tuple(-a % MODULUS for a in f)


def add(f: Element, g: Element) -> Element:
    """The sum."""
    return tuple((a + b) % MODULUS for a, b in zip(f, g, strict=True))


def multiply(f: Element, g: Element) -> Element:
    """The product, without the powers from X^5 on."""
    found = [0] * SIZE
    for i, a in enumerate(f):
        for j, b in enumerate(g[: SIZE - i]):
            found[i + j] = (found[i + j] + a * b) % MODULUS
    return tuple(found)


def compose(f: Element, g: Element) -> Element:
    """The first of the second, f(g), by Horner's rule."""
    found: Element = (0,) * SIZE
    for a in reversed(f):
        found = multiply(found, g)
        found = ((found[0] + a) % MODULUS, *found[1:])
    return found


def spelled(f: Element) -> str:
    """Five digits, the constant first."""
    return "".join(map(str, f))
