"""Which dimensions of a model's tensors hang together: dependency groups."""

from niwaki.dependency.groups import Groups, find_groups
from niwaki.dependency.member import Group, Member, Role
from niwaki.dependency.trace import Example

__all__ = ["Example", "Group", "Groups", "Member", "Role", "find_groups"]
