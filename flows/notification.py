"""Messages to people about runs, by apprise: mail, chat, a webhook."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from flows.errors import UserError

logger = logging.getLogger(__name__)
EXAMPLES = "ntfy://TOPIC, mailto://USER:PASSWORD@HOST, slack://TOKENS, json://HOST/PATH"


def check_address(address: str) -> None:
    """Raise UserError for an address that apprise does not know; the message does not repeat it, it may be secret."""
    from apprise import Apprise

    if not Apprise().add(address):
        scheme = address.partition("://")[0][:20]
        raise UserError(f"{scheme}://...: no address that apprise knows; such are {EXAMPLES}")


def send(address: str, title: str, text: str, *, failed: bool) -> None:
    """Send a message; a failure is logged and ends nothing."""
    from apprise import Apprise, AppriseAsset, NotifyType

    client = Apprise(asset=AppriseAsset(app_id="cm", app_desc="consistency-pipeline"))
    client.add(address)
    kind = NotifyType.FAILURE if failed else NotifyType.SUCCESS
    if not client.notify(text, title=title, notify_type=kind):
        logger.warning("notification: not delivered: %s", title)


@contextmanager
def told_of_failure(address: str | None, name: str) -> Iterator[None]:
    """Send a message if the body fails or is stopped. Raises UserError for an unknown address, before the body."""
    if address is None:
        yield
        return
    check_address(address)
    try:
        yield
    except Exception as error:
        send(address, f"{name} failed", str(error), failed=True)
        raise
    except BaseException:
        send(address, f"{name} was stopped", "by a signal", failed=True)
        raise
