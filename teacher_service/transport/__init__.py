"""Transport over HTTP: bounds of connections, bodies and answers in size and time; streamed answers; headers."""

from potstill.teacher_service.transport.bounded_transfers import BoundedTransfers
from potstill.teacher_service.transport.connections import BoundedServer
from potstill.teacher_service.transport.listener import BoundedListener
from potstill.teacher_service.transport.streamed import StreamedAnswer

__all__ = ["BoundedListener", "BoundedServer", "BoundedTransfers", "StreamedAnswer"]
