"""Names that PixelRec's files, and files made like them, give their columns; case does not count."""

from __future__ import annotations

ITEM = ("item_id", "item", "itemid", "iid", "video_id", "videoid")
USER = ("user_id", "user", "userid", "uid")
TIME = ("timestamp", "time", "ts")
TEXTS = {
    "title": ("title", "item_title"),
    "tag": ("tag", "tags"),
    "description": ("description", "desc"),
}
