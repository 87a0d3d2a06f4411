"""A small OpenAI-compatible HTTP server for one model, and the page that shows what the model does inside.

    text.py       tokens -> text, piece by piece, up to a stop string
    decode.py     sampling and the cached recurrence of a batch whose rows come and go
    engine.py     the one thread that runs the model: a queue, a batch, cancelled rows
    look.py       one step with everything seen: gates, norms, what each visit predicts
    protocol.py   what clients send and get, in OpenAI's form
    api.py        the endpoints
    page.html     the page
    chat.py       a conversation in the terminal (needs none of the above but text and decode)

FastAPI and uvicorn (`pip install 'undertow[serve]'`) load in protocol.py and api.py only.
"""

# First of all: the executor and the model import each other through transformers' auto classes, which works from here.
import undertow.model  # noqa: F401
