# %% the rooms of the audit: one for each target
import os

from audit_room import ApiTarget, LocalTarget, Room

url = os.environ.get("CHAT_API_URL")
if url:
    key = os.environ.get("OPENROUTER_API_KEY", "")
    names = [
        os.environ[name] for name in ("CHAT_API_MODEL", "CHAT_API_CONTROL") if name in os.environ
    ]
    rooms = {f"target-{i}": Room(ApiTarget(url, name, key)) for i, name in enumerate(names, 1)}
else:
    models = [globals()[name] for name in ("m", "control") if name in globals()]
    for model in models:
        model.template_args["enable_thinking"] = False  # templates without it take no notice
    rooms = {f"target-{i}": Room(LocalTarget(model)) for i, model in enumerate(models, 1)}
print(list(rooms), "tools:", [name for name in dir(Room) if not name.startswith("_")])
