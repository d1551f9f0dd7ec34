variable "region" {
  description = "Region of the image repositories. Instances of every region pull from here."
  type        = string
}

variable "name" {
  description = "Prefix of everything here: repositories `NAME/gateway`, roles `NAME-instance`, parameters `/NAME/…`."
  type        = string
  default     = "openpi-flash"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.name))
    error_message = "name: 2 to 31 lower-case letters, digits and hyphens, a letter first."
  }
}

variable "github_repository" {
  description = "`owner/repository` whose workflows may push images; null: no workflow may, and nothing is made for them."
  type        = string
  default     = null

  validation {
    condition     = var.github_repository == null || can(regex("^[A-Za-z0-9-]+/[A-Za-z0-9._-]+$", var.github_repository))
    error_message = "github_repository: expected owner/repository."
  }
}

variable "github_refs" {
  description = "Git references whose workflows may push images; `*` stands for anything."
  type        = list(string)
  default     = ["refs/heads/main", "refs/tags/v*"]

  validation {
    condition     = length(var.github_refs) > 0 && alltrue([for ref in var.github_refs : can(regex("^refs/(heads|tags)/.+$", ref))])
    error_message = "github_refs: each must begin with refs/heads/ or refs/tags/, such as refs/heads/main."
  }
}

variable "create_github_oidc_provider" {
  description = "false: the account has GitHub's identity provider already (there can be only one)."
  type        = bool
  default     = true
}

variable "secrets_kms_key_arn" {
  description = "Customer-managed key that encrypts the parameters of instances; null: the account's own key of Parameter Store."
  type        = string
  default     = null
}

variable "tags" {
  description = "Tags of everything here."
  type        = map(string)
  default     = { Project = "openpi-flash" }
}
