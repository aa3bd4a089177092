import re
import sys

name, class_name = "{{ cookiecutter.technique }}", "{{ cookiecutter.class_name }}"
if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or name.startswith("eke"):
    sys.exit(f"technique={name!r}: use lower-case words joined by hyphens, without the eke- prefix, as in 'token-drop'.")
if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", class_name):
    sys.exit(f"class_name={class_name!r}: use capitalized words without spaces, as in 'TokenDrop'.")
for key, value in (("summary", r"""{{ cookiecutter.summary }} """), ("paper", r"""{{ cookiecutter.paper }} """)):
    if re.search(r'["\\\n]', value):
        sys.exit(f"{key}={value.strip()!r}: it goes into quotes in several files. Leave out quotes and backslashes.")
