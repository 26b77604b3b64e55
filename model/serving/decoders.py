"""Decoders that a request may ask for by itself, as a server has them."""

from collections.abc import Callable, Collection
from typing import Any

from model.beams.command import beam_decoder, beam_settings
from model.beams.hypotheses import Beam
from model.beams.options import MOST_WIDTH
from model.decoding.batch import Batch, Piece, Request
from model.decoding.sampling import Sampling
from model.decoding.stopping import Ending
from model.inference.network import Network
from model.joint_decoding.command import joint_decoder
from model.serving.bodies import CommonBody
from model.serving.errors import refused
from model.serving.lanes import Alone, Forwards
from model.writing.asked_decoder import AskedDecoder, SettingError, check_names, checked

_NEUTRAL = {"beam_width": 1, "length_penalty": 1}


class Decoders:
    """Makes them.

    Args:
        network: the model.
        heads: how many of its heads are used; all but the first draft.
        eos_ids: tokens that end a text.
        most_beams: of a text; 0 = no request may ask for a decoder.
        drafter: a second model that drafts instead; None = the heads do.
        drafts: how many tokens it drafts.
    """

    def __init__(
        self,
        network: Network,
        heads: int,
        eos_ids: Collection[int],
        most_beams: int,
        drafter: Network | None = None,
        drafts: int = 0,
    ) -> None:
        self._network = network
        self._heads = heads
        self._eos_ids = frozenset(eos_ids)
        self._most_beams = most_beams
        self._drafter = drafter
        self._drafts = heads - 1 if drafter is None else drafts

    def see_room(self, positions: int) -> None:
        """See that there is memory for as many beams as there may be, drafts among them.

        It is taken when a text begins, and here only for a moment.

        Args:
            positions: that a text may have.
        """
        rows, widest = self._most_beams, min(self._most_beams, MOST_WIDTH)
        capacity = positions + 2 * (1 + self._drafts) * widest
        # Both at once, as a text has them.
        caches = [self._network.new_cache(rows, capacity, self._heads)]
        if self._drafter is not None:
            caches.append(self._drafter.new_cache(rows, capacity))

    def of(self, body: CommonBody, likeliest: int | None) -> tuple[Alone | None, dict[str, Any]]:
        """What a request asks for, and what its answer says of it.

        Args:
            body: of the request.
            likeliest: how many likeliest tokens it wants to be told of; None = no probabilities.

        Returns:
            None and nothing, where it asks for no decoder.

        Raises:
            ApiError: it cannot be served so.
        """
        try:
            asked = self._asked(body, body.sampling())
        except SettingError as error:
            raise refused(error.name, error.message) from None
        if asked is None:
            return None, {}
        if asked.of_beams and body.stream:
            raise refused(
                "stream",
                f"a text of the decoder {asked.decoder} is known when all its beams have ended, so "
                "it does not come in pieces; leave stream out, or ask for mtad or no decoder",
            )
        if asked.of_beams and likeliest:
            raise refused(
                "logprobs",
                f"of the decoder {asked.decoder} there are no likeliest other tokens; ask for "
                "those of the text's own tokens alone (0, in chats without top_logprobs)",
            )
        forwards = self._beams(asked) if asked.of_beams else self._joint(asked)
        marks = {"decoder": asked.decoder, "lossy": asked.lossy}
        return Alone(asked.decoder, asked.beam_width or 1, forwards), marks

    def _asked(self, body: CommonBody, sampling: Sampling) -> AskedDecoder | None:
        settings = {name: getattr(body, name) for name in AskedDecoder._fields}
        if body.decoder is None:
            # As of fields that are not built: values that change nothing do no harm.
            check_names({n: v for n, v in settings.items() if v != _NEUTRAL.get(n)}, None)
            return None
        if self._most_beams == 0:
            raise SettingError(
                "decoder",
                "this server has no decoders by request (--max-beams 0); leave it out",
            )
        return checked(
            AskedDecoder(**settings),
            sampling,
            drafts=self._drafts,
            most_width=self._most_beams,
        )

    def _beams(self, asked: AskedDecoder) -> Callable[[int, Request], Forwards]:
        def forwards(number: int, request: Request) -> Forwards:
            sampling, seed = request.options.sampling, request.options.seed
            decoder = beam_decoder(
                asked,
                self._network,
                [request.prompt],
                beam_settings(asked, request.max_new_tokens, sampling, self._eos_ids, request.stop),
                [seed],
                drafts=self._drafts,
                drafter=self._drafter,
            )
            while decoder.going:
                yield []
                decoder.round()
            found = decoder.generation()
            yield [_piece_of(number, request, found.ranked[0][0], found.forwards)]

        return forwards

    def _joint(self, asked: AskedDecoder) -> Callable[[int, Request], Forwards]:
        def forwards(number: int, request: Request) -> Forwards:
            decoder = joint_decoder(
                asked,
                self._network,
                heads=self._heads,
                drafter=self._drafter,
                drafts=self._drafts,
                eos_ids=self._eos_ids,
            )
            batch = Batch(decoder, 1, len(request.prompt) + request.max_new_tokens)
            yield batch.join({number: request})
            while batch.rows:
                yield batch.step()

        return forwards


def _piece_of(number: int, request: Request, beam: Beam, forward: int) -> Piece:
    """A whole text."""
    tokens = list(beam.tokens)
    ending = Ending(request.max_new_tokens, request.eos_id, request.stop)
    ending.take(tokens)
    wanted = request.options.likeliest is not None
    return Piece(
        number,
        tokens,
        list(beam.logprobs) if wanted else None,
        forward,
        [[] for _ in tokens] if wanted else None,
        ended=True,
        at_limit=ending.at_limit,
    )
