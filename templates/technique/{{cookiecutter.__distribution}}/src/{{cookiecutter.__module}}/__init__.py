"""{{ cookiecutter.summary }}."""

{% if cookiecutter.kind == "callback" -%}
from {{ cookiecutter.__module }}.callback import {{ cookiecutter.class_name }}, scale_gradients, share

__all__ = ["{{ cookiecutter.class_name }}", "scale_gradients", "share"]
{%- elif cookiecutter.kind == "plugin" -%}
from {{ cookiecutter.__module }}.plugin import {{ cookiecutter.class_name }}, fuse

__all__ = ["{{ cookiecutter.class_name }}", "fuse"]
{%- else -%}
from {{ cookiecutter.__module }}.strategy import {{ cookiecutter.class_name }}

__all__ = ["{{ cookiecutter.class_name }}"]
{%- endif %}
