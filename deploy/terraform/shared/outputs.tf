output "image_registry" {
  description = "Prefix of the images, for `image_registry` of an instance."
  value       = dirname(aws_ecr_repository.image["gateway"].repository_url)
}

output "instance_profile" {
  description = "For `instance_profile` of an instance."
  value       = aws_iam_instance_profile.instance.name
}

output "secrets_prefix" {
  description = "Below this name an instance may read parameters."
  value       = "/${var.name}/"
}

output "github_role_arn" {
  description = "For `role-to-assume` of the workflow that pushes images; null without github_repository."
  value       = one(aws_iam_role.github[*].arn)
}

output "login_command" {
  description = "Lets docker push to the registry."
  value       = "aws ecr get-login-password --region ${var.region} | docker login --username AWS --password-stdin ${split("/", aws_ecr_repository.image["gateway"].repository_url)[0]}"
}
