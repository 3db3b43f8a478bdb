"""Which dimensions of a model's tensors hang together: dependency groups."""

from niwaki.dependency.groups import Groups, find_groups
from niwaki.dependency.member import Group, Kind, Member, Role
from niwaki.dependency.trace import Example

__all__ = ["Example", "Group", "Groups", "Kind", "Member", "Role", "find_groups"]
