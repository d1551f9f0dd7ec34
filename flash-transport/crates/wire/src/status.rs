//! gRPC's status codes, and why a request has no answer.

/// A gRPC status code other than OK, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)] // gRPC's own
pub enum Code {
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

const CODES: [(Code, &str); 16] = [
    (Code::Cancelled, "CANCELLED"),
    (Code::Unknown, "UNKNOWN"),
    (Code::InvalidArgument, "INVALID_ARGUMENT"),
    (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
    (Code::NotFound, "NOT_FOUND"),
    (Code::AlreadyExists, "ALREADY_EXISTS"),
    (Code::PermissionDenied, "PERMISSION_DENIED"),
    (Code::ResourceExhausted, "RESOURCE_EXHAUSTED"),
    (Code::FailedPrecondition, "FAILED_PRECONDITION"),
    (Code::Aborted, "ABORTED"),
    (Code::OutOfRange, "OUT_OF_RANGE"),
    (Code::Unimplemented, "UNIMPLEMENTED"),
    (Code::Internal, "INTERNAL"),
    (Code::Unavailable, "UNAVAILABLE"),
    (Code::DataLoss, "DATA_LOSS"),
    (Code::Unauthenticated, "UNAUTHENTICATED"),
];

impl Code {
    /// The code of a number from a peer; UNKNOWN for a number that gRPC does not have.
    pub fn from_number(number: u32) -> Self {
        CODES.iter().find(|(code, _)| *code as u32 == number).map_or(Self::Unknown, |(code, _)| *code)
    }

    /// gRPC's name for it, e.g. `INVALID_ARGUMENT`.
    pub fn name(self) -> &'static str {
        CODES[self as usize - 1].1
    }
}

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", code.name())]
pub struct Refusal {
    /// gRPC's status.
    pub code: Code,
    /// What was wrong and what was expected.
    pub message: String,
    /// Path of the offending field; empty where there is none.
    pub field: String,
}

impl Refusal {
    /// A refusal that names no field.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), field: String::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_grpcs_numbers_and_names() {
        for (index, (code, _)) in CODES.iter().enumerate() {
            assert_eq!(*code as usize, index + 1);
            assert_eq!(Code::from_number(*code as u32), *code);
        }
        assert_eq!(Code::Unauthenticated.name(), "UNAUTHENTICATED");
        assert_eq!(Code::from_number(0), Code::Unknown);
        assert_eq!(Code::from_number(17), Code::Unknown);
    }
}
