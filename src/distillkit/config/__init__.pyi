from .files import load as load
