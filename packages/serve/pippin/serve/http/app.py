"""All routes: OpenAI's API, the server's state, and the page."""

import pathlib
from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from pippin.serve.callers import Identities
from pippin.serve.frontend import Frontend
from pippin.serve.http.api import OpenAIApi
from pippin.serve.http.embeddings import EmbeddingsApi
from pippin.serve.http.guard import Guard
from pippin.serve.http.http_limits import HttpLimits

_PAGE = pathlib.Path(__file__).parent / "page"
# Path -> file and its type.
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def make_app(
    frontend: Frontend,
    identities: Identities,
    is_serving: Callable[[], bool],
    registry: CollectorRegistry,
    limits: HttpLimits,
    *,
    local_only: bool,
) -> ASGIApp:
    """The application. The page's files are anybody's, all else needs a caller who is known."""
    routes = [
        *OpenAIApi(frontend, limits).routes(),
        *EmbeddingsApi(frontend, limits).routes(),
        *_state_routes(frontend, is_serving, registry),
        *(_page_route(path) for path in _FILES),
    ]
    return Guard(
        Router(routes, redirect_slashes=False),
        identities,
        public=list(_FILES),
        local_only=local_only,
        slow_reader_timeout_s=frontend.limits.slow_reader_timeout_s,
    )


def make_metrics_app(
    registry: CollectorRegistry, slow_reader_timeout_s: float, *, local_only: bool
) -> ASGIApp:
    """Prometheus metrics and nothing else, for anybody."""
    return Guard(
        Router([_metrics_route(registry)], redirect_slashes=False),
        Identities(None),
        public=[],
        local_only=local_only,
        slow_reader_timeout_s=slow_reader_timeout_s,
    )


def _state_routes(
    frontend: Frontend, is_serving: Callable[[], bool], registry: CollectorRegistry
) -> list[Route]:
    async def health(_: Request) -> Response:
        serving = is_serving()
        return JSONResponse({"status": "SERVING" if serving else "NOT_SERVING"}, 200 if serving else 503)

    async def load(_: Request) -> Response:
        now = frontend.engine.load()
        return JSONResponse(
            {
                "model": frontend.model.name,
                "serving": is_serving(),
                "running": now.num_running,
                "waiting": now.num_waiting,
                "waiting_tokens": now.waiting_tokens,
                "cache_usage": now.used_pages / now.num_pages,
                "generated_tokens": now.generated,
            },
            headers={"cache-control": "no-store"},
        )

    return [Route("/health", health), Route("/load", load), _metrics_route(registry)]


def _metrics_route(registry: CollectorRegistry) -> Route:
    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return Route("/metrics", metrics)


def _page_route(path: str) -> Route:
    name, kind = _FILES[path]
    content = (_PAGE / name).read_bytes()

    async def page(_: Request) -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    return Route(path, page)
