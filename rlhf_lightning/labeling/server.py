"""The web server of `rlhf label`, and what it refuses: other hosts, other sites, strangers, large requests."""

import hmac
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from rlhf_lightning.labeling import page as pages
from rlhf_lightning.labeling.queue import LabelQueue
from rlhf_lightning.labeling.store import is_choice
from rlhf_lightning.web import Access, Guard, equal, read_body

log = logging.getLogger(__name__)
BODY = 32 * 1024
"""Largest request body in bytes; a note of 2,000 characters takes at most 24,000."""
FORM = "application/x-www-form-urlencoded"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
ASSETS = {"label.css": "text/css", "label.js": "text/javascript"}


@dataclass
class LabelServer:
    """Serves the pages of a queue.

    Args:
        queue: The comparisons and decisions.
        access: Who may use the page.
        coming: Returns True while more comparisons may come.
        failed: Returns True if making comparisons has failed.

    Example:
        >>> app = LabelServer(queue).app()  # doctest: +SKIP
    """

    queue: LabelQueue
    access: Access = field(default_factory=Access)
    coming: Callable[[], bool] = lambda: False
    failed: Callable[[], bool] = lambda: False
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    """Signs cookies. It is new in every process, so annotators sign in again after a restart."""

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/", self._show),
            Route("/sign-in", self._sign_in, methods=["POST"]),
            Route("/sign-out", self._sign_out, methods=["POST"]),
            Route("/decide", self._decide, methods=["POST"]),
            Route("/undo", self._undo, methods=["POST"]),
            Route("/favicon.ico", _no_content),
            *(Route(f"/{name}", _asset(name, kind)) for name, kind in ASSETS.items()),
        ]
        return Starlette(
            routes=routes,
            middleware=[
                Middleware(
                    Guard, access=self.access, refusal=_refusal, headers=HEADERS, command="rlhf label", is_page=True
                )
            ],
            exception_handlers={HTTPException: _on_error},
        )

    # -- pages --------------------------------------------------------------------------------------------------------

    async def _show(self, request: Request) -> Response:
        annotator = self._annotator(request)
        if annotator is None:
            return HTMLResponse(pages.sign_in_page(self.queue.assignment.annotators, self.access.token is not None))
        return self._page(annotator, request)

    def _page(self, annotator: str, request: Request, problem: str | None = None) -> HTMLResponse:
        csrf = self._csrf(request)
        coming = self.coming()  # before the queue, so that the last answers are not overlooked
        shown, progress = self.queue.show(annotator), self.queue.progress(annotator)
        if shown is not None:
            return HTMLResponse(
                pages.comparison_page(annotator, csrf, shown, progress, problem), 507 if problem else 200
            )
        return HTMLResponse(pages.waiting_page(annotator, csrf, progress, coming, self.failed()))

    async def _sign_in(self, request: Request) -> Response:
        form = await _form(request)
        names, needs_token = self.queue.assignment.annotators, self.access.token is not None
        name = " ".join(form.get("name", "").split())
        problem = None
        if not self.access.allows_token(form.get("token", "")):
            problem = "The token is wrong."
        elif not (0 < len(name) <= pages.NAME and name.isprintable()):
            problem = f"Give a name of 1 to {pages.NAME} characters."
        elif names and name not in names:
            problem = "This name is not in the list of annotators."
        if problem:
            return HTMLResponse(pages.sign_in_page(names, needs_token, problem), 403)
        response = RedirectResponse("/", 303)
        value = f"{name.encode().hex()}.{secrets.token_hex(8)}"
        response.set_cookie(
            _cookie(request), f"{value}.{self._sign('session', value)}", httponly=True, samesite="strict"
        )
        return response

    async def _sign_out(self, request: Request) -> Response:
        await self._signed_form(request)
        response = RedirectResponse("/", 303)
        response.delete_cookie(_cookie(request), httponly=True, samesite="strict")
        return response

    async def _decide(self, request: Request) -> Response:
        annotator, form = await self._signed_form(request)
        choice = form.get("choice", "")
        if not is_choice(choice):
            raise HTTPException(400, "the form has no valid choice")
        try:
            self.queue.decide(annotator, form.get("comparison", ""), choice, form.get("note", "").strip()[: pages.NOTE])
        except OSError as error:
            return self._unsaved(annotator, request, error)
        return RedirectResponse("/", 303)

    async def _undo(self, request: Request) -> Response:
        annotator, _ = await self._signed_form(request)
        try:
            self.queue.undo(annotator)
        except OSError as error:
            return self._unsaved(annotator, request, error)
        return RedirectResponse("/", 303)

    def _unsaved(self, annotator: str, request: Request, error: OSError) -> Response:
        log.error("%s: a decision of %s was not stored: %s", self.queue.store.folder, annotator, error)
        return self._page(annotator, request, f"Your last choice was not stored ({error.strerror}). Choose again.")

    # -- sessions -----------------------------------------------------------------------------------------------------

    def _annotator(self, request: Request) -> str | None:
        """The annotator who is signed in."""
        value, _, signature = request.cookies.get(_cookie(request), "").rpartition(".")
        if not equal(signature, self._sign("session", value)):
            return None
        return bytes.fromhex(value.partition(".")[0]).decode()

    async def _signed_form(self, request: Request) -> tuple[str, dict[str, str]]:
        """The annotator and the fields of a form that this server has made for this session."""
        annotator, form = self._annotator(request), await _form(request)
        if annotator is None or not equal(form.get("csrf", ""), self._csrf(request)):
            raise HTTPException(403, "Your last choice was not stored, because you are not signed in. Sign in again.")
        return annotator, form

    def _csrf(self, request: Request) -> str:
        return self._sign("form", request.cookies.get(_cookie(request), ""))

    def _sign(self, purpose: str, value: str) -> str:
        return hmac.digest(self._secret, f"{purpose}:{value}".encode(), "sha256").hex()


def _cookie(request: Request) -> str:
    """Name of the session's cookie. Browsers share cookies between the ports of a host."""
    return f"rlhf_label_{request.url.port or 80}"


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form."""
    body = await read_body(request, FORM, BODY)
    try:
        found = parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=16)
    except ValueError:
        raise HTTPException(400, "the form is malformed") from None
    return {name: values[-1] for name, values in found.items()}


def _refusal(status: int, problem: str) -> Response:
    return HTMLResponse(pages.problem_page(problem), status)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refusal(error.status_code, error.detail)


async def _no_content(request: Request) -> Response:
    return Response(status_code=204)


def _asset(name: str, kind: str) -> Callable[[Request], Response]:
    content = files("rlhf_lightning.labeling").joinpath(name).read_bytes()

    def serve(request: Request) -> Response:
        return Response(content, media_type=kind)

    return serve
