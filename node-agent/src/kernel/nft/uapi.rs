//! Numbers of linux/netfilter/nf_tables.h and linux/netfilter/nfnetlink.h.

const SUBSYSTEM: u16 = 10 << 8;
pub(super) const SUBSYSTEM_ID: u16 = 10;

pub(super) const NEW_TABLE: u16 = SUBSYSTEM;
pub(super) const GET_TABLE: u16 = SUBSYSTEM | 1;
pub(super) const DEL_TABLE: u16 = SUBSYSTEM | 2;
pub(super) const NEW_CHAIN: u16 = SUBSYSTEM | 3;
pub(super) const GET_CHAIN: u16 = SUBSYSTEM | 4;
pub(super) const DEL_CHAIN: u16 = SUBSYSTEM | 5;
pub(super) const NEW_RULE: u16 = SUBSYSTEM | 6;
pub(super) const GET_RULE: u16 = SUBSYSTEM | 7;
pub(super) const DEL_RULE: u16 = SUBSYSTEM | 8;
pub(super) const NEW_GEN: u16 = SUBSYSTEM | 15;
pub(super) const GET_GEN: u16 = SUBSYSTEM | 16;
pub(super) const BATCH_BEGIN: u16 = 0x10;
pub(super) const BATCH_END: u16 = 0x11;
pub(super) const BATCH_GENERATION: u16 = 1;
pub(super) const GEN_ID: u16 = 1;
/// Multicast group of everything that is committed.
pub(super) const GROUP_NFTABLES: u32 = 7;

pub(super) const FLAG_DORMANT: u32 = 1;
pub(super) const FLAG_OWNER: u32 = 2;

pub(super) mod table {
    pub(in super::super) const NAME: u16 = 1;
    pub(in super::super) const FLAGS: u16 = 2;
    pub(in super::super) const USERDATA: u16 = 6;
}

pub(super) mod chain {
    pub(in super::super) const TABLE: u16 = 1;
    pub(in super::super) const NAME: u16 = 3;
    pub(in super::super) const HOOK: u16 = 4;
    pub(in super::super) const POLICY: u16 = 5;
    pub(in super::super) const TYPE: u16 = 7;
    pub(in super::super) const HOOK_NUMBER: u16 = 1;
    pub(in super::super) const HOOK_PRIORITY: u16 = 2;
}

pub(super) mod rule {
    pub(in super::super) const TABLE: u16 = 1;
    pub(in super::super) const CHAIN: u16 = 2;
    pub(in super::super) const HANDLE: u16 = 3;
    pub(in super::super) const EXPRESSIONS: u16 = 4;
    pub(in super::super) const POSITION: u16 = 6;
    pub(in super::super) const USERDATA: u16 = 7;
}

pub(super) const LIST_ELEMENT: u16 = 1;
pub(super) const EXPR_NAME: u16 = 1;
pub(super) const EXPR_DATA: u16 = 2;
pub(super) const DATA_VALUE: u16 = 1;
pub(super) const DATA_VERDICT: u16 = 2;
pub(super) const VERDICT_CODE: u16 = 1;
pub(super) const VERDICT_CHAIN: u16 = 2;
/// `NFT_REG_VERDICT`, `NFT_REG_1`.
pub(super) const REGISTER_VERDICT: u32 = 0;
pub(super) const REGISTER: u32 = 1;
/// `NFT_REG_2`.
pub(super) const REGISTER_2: u32 = 2;
pub(super) const META_MARK: u32 = 3;
pub(super) const META_IIFNAME: u32 = 6;
pub(super) const META_NFPROTO: u32 = 15;
pub(super) const META_L4PROTO: u32 = 16;
pub(super) const BASE_NETWORK: u32 = 1;
pub(super) const BASE_TRANSPORT: u32 = 2;
/// `NFT_FIB_RESULT_ADDRTYPE`, `NFTA_FIB_F_DADDR`.
pub(super) const FIB_TYPE: u32 = 3;
pub(super) const FIB_DESTINATION: u32 = 2;
/// `NFT_NAT_DNAT`.
pub(super) const NAT_DNAT: u32 = 1;
/// `NF_NAT_RANGE_MAP_IPS` and `NF_NAT_RANGE_PROTO_SPECIFIED` of linux/netfilter/nf_nat.h: what registers imply.
pub(super) const NAT_IMPLIED: u32 = 3;
pub(super) const CMP_EQUAL: u32 = 0;
pub(super) const CMP_NOT_EQUAL: u32 = 1;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY` of linux/netfilter/nf_nat.h.
pub(super) const RANDOM_FULLY: u32 = 1 << 4;
/// A comment in the user data of rule, chain and table alike (libnftnl/udata.h).
pub(super) const UDATA_COMMENT: u8 = 0;

pub(super) const DROP: i32 = 0;
pub(super) const ACCEPT: i32 = 1;
pub(super) const JUMP: i32 = -3;
pub(super) const GOTO: i32 = -4;
pub(super) const RETURN: i32 = -5;
