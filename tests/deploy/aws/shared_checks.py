"""What all instances share: the registry, and the rights of instances and of the repository's workflows."""

import json
import re
from typing import Any

from tests.deploy.aws.servers import REGION
from tests.deploy.aws.stand_in import StandIn
from tests.deploy.dockerfile import images


def test_repositories_keep_latest_and_three_more(shared: dict[str, Any], aws: StandIn) -> None:
    ecr = aws.client("ecr", REGION)
    names = {repository["repositoryName"] for repository in ecr.describe_repositories()["repositories"]}
    assert names == {f"openpi-flash/{image}" for image in images()}
    assert shared["image_registry"] == f"123456789012.dkr.ecr.{REGION}.amazonaws.com/openpi-flash"
    for name in names:
        policy = json.loads(ecr.get_lifecycle_policy(repositoryName=name)["lifecyclePolicyText"])
        latest, tagged, untagged = (rule["selection"] for rule in policy["rules"])
        assert [rule["rulePriority"] for rule in policy["rules"]] == [1, 2, 3]
        assert (latest["tagPatternList"], latest["countType"], latest["countNumber"]) == (
            ["latest"],
            "imageCountMoreThan",
            1,
        )
        assert (tagged["tagPatternList"], tagged["countType"], tagged["countNumber"]) == (
            ["*"],
            "imageCountMoreThan",
            4,
        )
        assert untagged["tagStatus"] == "untagged"


def permissions(aws: StandIn, role: str, policy: str) -> dict[str, set[str]]:
    """Actions by resource, of all statements, which must allow."""
    document = aws.client("iam", REGION).get_role_policy(RoleName=role, PolicyName=policy)["PolicyDocument"]
    found: dict[str, set[str]] = {}
    for statement in document["Statement"]:
        assert statement["Effect"] == "Allow"
        for resource in as_list(statement["Resource"]):
            found.setdefault(resource, set()).update(as_list(statement["Action"]))
    return found


def as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def test_workflows_of_the_repository_alone_may_push(shared: dict[str, Any], aws: StandIn) -> None:
    role = aws.client("iam", REGION).get_role(RoleName="openpi-flash-github")["Role"]
    (statement,) = role["AssumeRolePolicyDocument"]["Statement"]
    assert shared["github_role_arn"] == role["Arn"]
    assert statement["Action"] == "sts:AssumeRoleWithWebIdentity"
    host = "token.actions.githubusercontent.com"
    assert statement["Condition"] == {
        "StringEquals": {f"{host}:aud": "sts.amazonaws.com"},
        "StringLike": {f"{host}:sub": ["repo:acme/robots:ref:refs/heads/main", "repo:acme/robots:ref:refs/tags/v*"]},
    }
    allowed = permissions(aws, "openpi-flash-github", "push-images")
    assert allowed.pop("*") == {"ecr:GetAuthorizationToken"}
    assert all(re.fullmatch(rf"arn:aws:ecr:{REGION}:\d+:repository/openpi-flash/[a-z-]+", arn) for arn in allowed)
    assert {action for actions in allowed.values() for action in actions} == {
        "ecr:BatchCheckLayerAvailability",
        "ecr:BatchGetImage",
        "ecr:CompleteLayerUpload",
        "ecr:GetDownloadUrlForLayer",
        "ecr:InitiateLayerUpload",
        "ecr:PutImage",
        "ecr:UploadLayerPart",
    }


def test_instances_may_pull_and_read_their_secrets_alone(shared: dict[str, Any], aws: StandIn) -> None:
    allowed = permissions(aws, "openpi-flash-instance", "serve")
    everywhere = allowed.pop("*")
    assert {action for action in everywhere if not action.startswith("ssmmessages:")} == {
        "ecr:GetAuthorizationToken",
        "ssm:UpdateInstanceInformation",
    }
    assert allowed.pop("arn:aws:ssm:*:123456789012:parameter/openpi-flash/*") == {"ssm:GetParameter"}
    assert len(allowed) == len(images())
    for actions in allowed.values():
        assert actions == {"ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"}
