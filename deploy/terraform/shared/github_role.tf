# What the repository's workflows may do: push images. They prove who they are by GitHub's own tokens and keep no key.

locals {
  github_host = "token.actions.githubusercontent.com"
  with_github = var.github_repository != null
}

resource "aws_iam_openid_connect_provider" "github" {
  count = local.with_github && var.create_github_oidc_provider ? 1 : 0

  url            = "https://${local.github_host}"
  client_id_list = ["sts.amazonaws.com"]
}

data "aws_iam_openid_connect_provider" "github" {
  count = local.with_github && !var.create_github_oidc_provider ? 1 : 0

  url = "https://${local.github_host}"
}

data "aws_iam_policy_document" "github_trust" {
  count = local.with_github ? 1 : 0

  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]

    principals {
      type        = "Federated"
      identifiers = [one(concat(aws_iam_openid_connect_provider.github[*].arn, data.aws_iam_openid_connect_provider.github[*].arn))]
    }

    condition {
      test     = "StringEquals"
      variable = "${local.github_host}:aud"
      values   = ["sts.amazonaws.com"]
    }

    # Without this, every repository on GitHub could push.
    condition {
      test     = "StringLike"
      variable = "${local.github_host}:sub"
      values   = [for ref in var.github_refs : "repo:${var.github_repository}:ref:${ref}"]
    }
  }
}

data "aws_iam_policy_document" "github" {
  statement {
    sid       = "LogInToTheRegistry"
    actions   = ["ecr:GetAuthorizationToken"] # has no resource
    resources = ["*"]
  }

  statement {
    sid = "PushImages"
    actions = [
      "ecr:BatchCheckLayerAvailability",
      "ecr:BatchGetImage",
      "ecr:CompleteLayerUpload",
      "ecr:GetDownloadUrlForLayer",
      "ecr:InitiateLayerUpload",
      "ecr:PutImage",
      "ecr:UploadLayerPart",
    ]
    resources = [for repository in aws_ecr_repository.image : repository.arn]
  }
}

resource "aws_iam_role" "github" {
  count = local.with_github ? 1 : 0

  name               = "${var.name}-github"
  assume_role_policy = data.aws_iam_policy_document.github_trust[0].json
}

resource "aws_iam_role_policy" "github" {
  count = local.with_github ? 1 : 0

  name   = "push-images"
  role   = aws_iam_role.github[0].id
  policy = data.aws_iam_policy_document.github.json
}
